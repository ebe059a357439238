// A launch over several matrices, each with its own decoder: a block works on one of them.

constexpr int MOST_SEGMENTS = 8;

struct Segment {
    const u8 *codes;     // [row tiles][chunks][CHUNK_BYTES]
    const u32 *entries;  // the decoder's table
    const u16 *scales;   // [M] float16
    int row_tiles, rows;
    int rows_per_block;  // row tiles, or items: see teams.cu
    int first_block;     // that works on this segment
    int out_offset;      // of its first output, in elements of y
    int decoder;         // its index in DECODERS
    u32 hash_unit;       // see Decoder::decode
    int first_tile;      // row tiles of the segments before
};

struct Problem {
    Segment segments[MOST_SEGMENTS];
    const u8 *x;            // of a product: [chunks][pairs of tiles][fragment][column][4 lanes][8 halves]
    const float *x_scales;  // [BATCH] what a column was divided by
    void *y;                // [batch][y_stride], products; or [rows of all segments][y_stride], matrices
    int segment_count, chunks, batch, y_stride;
    int out_type;       // see common.cuh
    float fixed_point;  // what a sum is multiplied by to become an integer: no sum can leave 32 bits, see multiply.py
    int run;            // chunks that are summed in floating point, in teams.cu
    int sum_tiles;      // row tiles of all segments: of what blocks add up there
    int *sums;          // [lots][sum_tiles][SUMS], zeros before
    int *counts;        // [lots][sum_tiles] of the runs that have been added; zeros before
};

template <class... Types>
constexpr int COUNT_OF = sizeof...(Types);

template <int INDEX, class First, class... Rest>
struct At { typedef typename At<INDEX - 1, Rest...>::Type Type; };
template <class First, class... Rest>
struct At<0, First, Rest...> { typedef First Type; };

// The work of one of the decoders of indices FROM to TO. Where other decoders' code could follow, the compiler keeps values
// for it, and spills (8 decoders, batch 1: 848 bytes, this way none): what lives on is in shared memory.
template <class Work, int FROM, int TO, class... Arguments>
__device__ __forceinline__ void dispatch(int decoder, const Arguments &...arguments) {
    if constexpr (TO - FROM == 1) Work::template run<typename At<FROM, DECODERS>::Type>(arguments...);
    else {
        constexpr int middle = (FROM + TO) / 2;
        if (decoder < middle) return dispatch<Work, FROM, middle>(decoder, arguments...);
        return dispatch<Work, middle, TO>(decoder, arguments...);
    }
}

template <class Work>
__device__ __forceinline__ void run_segment(const Problem &problem) {
    int index = 0;
    while (index + 1 < problem.segment_count && (int)blockIdx.x >= problem.segments[index + 1].first_block) index++;
    const Segment &segment = problem.segments[index];
    dispatch<Work, 0, COUNT_OF<DECODERS>>(segment.decoder, problem, segment);
}
