// y = W' x' for packed matrices W' (M x K) that read the same x', batch 1 to 16: decode in registers, multiply by mma.
//
// A block owns some 16-row tiles of one segment (matrix). It takes them in rounds; the (chunk of columns, row tile) items
// of a round are one list, cut evenly over the warps. A warp keeps its chunk of x' in registers for all rows, and refills
// its registers of packed bits, part by part, with the next item's as soon as their last tile is decoded. Its sums wait in
// shared memory and are added in the order of the warps: the same bits on every run.
//
// Nothing of the weights depends on the kernel before: bits, table and scales are fetched before its end is waited for.
//
// Compile-time constants: THREADS, TABLE_BYTES, SUM_BYTES, BATCH (columns of x': 1, 2, 4, 8 or 16), DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int MOST_SEGMENTS = 8;
constexpr int FRAGMENTS = BATCH > 8 ? 2 : 1;    // of eight columns
constexpr int COLUMNS = BATCH > 8 ? 8 : BATCH;  // of x' in each
constexpr int PAIRS = CHUNK / 2;                // of tiles: what a lane loads of x' at once
constexpr int X_PAIR = 64 * BATCH;              // bytes
constexpr int X_CHUNK = PAIRS * X_PAIR;
constexpr int SUMS = 16 * BATCH;                // of a row tile, [column][row]
constexpr int MOST_ROWS = SUM_BYTES / (4 * WARPS * SUMS);  // row tiles of a round

struct Segment {
    const u8 *codes;     // [row tiles][chunks][CHUNK_BYTES]
    const u32 *entries;  // the decoder's table
    const u16 *scales;   // [M] float16
    int row_tiles, rows;
    int rows_per_block;  // row tiles
    int first_block;     // that works on this segment
    int out_offset;      // of its first output
    int decoder;
    u32 hash_unit;       // see Decoder::decode
};

struct Problem {
    Segment segments[MOST_SEGMENTS];
    const u8 *x;            // [chunks][pairs of tiles][fragment][column][4 lanes][8 halves]
    const float *x_scales;  // [BATCH] what a column was divided by
    void *y;                // [batch][y_stride]
    int segment_count, chunks, batch, y_stride;
    int out_type;           // 0 float16, 1 bfloat16, 2 float32
};

extern __shared__ __align__(16) u8 shared[];  // table, then sums [WARPS][row tiles of a round][SUMS]

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void multiply_tile(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ void store(const Problem &problem, int column, int row, float value) {
    const size_t at = (size_t)column * problem.y_stride + row;
    u16 bits;
    if (problem.out_type == 2) ((float *)problem.y)[at] = value;
    else {
        if (problem.out_type == 1) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        ((u16 *)problem.y)[at] = bits;
    }
}

// A lane's four sums of a fragment in shared memory; lanes whose columns are not there leave it alone. No branch: code
// behind a divergent one loses the uniform registers, which cost every look-up an instruction.
__device__ __forceinline__ void save(float *out, const float (&sum)[4], u32 lane) {
    const u32 address = (u32)__cvta_generic_to_shared(out + lane % 4 * 32 + lane / 4), wanted = lane % 4 * 2 < COLUMNS;
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0;\n@p st.shared.f32 [%0], %1;\n@p st.shared.f32 [%0 + 32], %3;}"
        :: "r"(address), "f"(sum[0]), "f"(sum[1]), "f"(sum[2]), "f"(sum[3]), "r"(wanted) : "memory");
    if (COLUMNS > 1)
        asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0;\n@p st.shared.f32 [%0 + 64], %2;\n@p st.shared.f32 [%0 + 96], %4;}"
            :: "r"(address), "f"(sum[0]), "f"(sum[1]), "f"(sum[2]), "f"(sum[3]), "r"(wanted) : "memory");
}

__device__ __forceinline__ void restore(float (&sum)[4], const float *out, u32 lane) {
    const float *from = out + (lane % 4 * 2 < COLUMNS ? lane % 4 * 32 : 0) + lane / 4;
    sum[0] = from[0], sum[2] = from[8];
    sum[1] = COLUMNS > 1 ? from[16] : 0, sum[3] = COLUMNS > 1 ? from[24] : 0;
}

// A block's rows, cut into rounds, and a warp's way through the items of a round, which count the rows of a chunk fastest:
// so that a chunk of x' is loaded once for all of them.
template <class D>
struct Walk {
    const u8 *base;
    size_t row_bytes;  // from a row tile to the next
    int warp, chunks, block_end, round_rows;
    int row, rows;           // of the round
    int chunk, tile, left;   // the item, and how many are left in the round
    const u8 *codes;

    __device__ Walk(const Problem &problem, const Segment &segment, int warp, int begin, int end)
        : base(segment.codes), row_bytes((size_t)problem.chunks * D::CHUNK_BYTES), warp(warp), chunks(problem.chunks), block_end(end),
          round_rows((end - begin + rounds(end - begin) - 1) / rounds(end - begin)) {
        start(begin);
    }
    static __device__ int rounds(int rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }

    __device__ void start(int round_row) {
        row = round_row;
        rows = min(round_rows, block_end - row);
        const int items = rows * chunks;
        const int begin = items * warp / WARPS;
        chunk = begin / rows, tile = begin % rows, left = items * (warp + 1) / WARPS - begin;
        point();
    }
    __device__ void point() { codes = base + (row + tile) * row_bytes + (size_t)chunk * D::CHUNK_BYTES; }
    __device__ bool last_round() const { return row + round_rows >= block_end; }
    __device__ void advance() {
        left--;
        if (++tile == rows) tile = 0, chunk++;
        point();
    }
};

// One item: 16 tiles decoded and multiplied. A part of the packed bits is replaced by `next`'s after its last tile.
template <class D>
__device__ __forceinline__ void multiply_item(float *out, u32 (&words)[D::WORDS], const Walk<D> &next, const uint4 (&x)[FRAGMENTS][PAIRS],
                                              u32 lane, u32 unit) {
    float sum[FRAGMENTS][4];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) restore(sum[f], out + f * 128, lane);
#pragma unroll
    for (int t = 0; t < CHUNK; t++) {
        u32 a[4];
        D::decode(a, words, t, lane, unit, shared);
#pragma unroll
        for (int part = 0; part < D::PARTS; part++)
            if (D::last_tile(part) == t && next.left) D::load_part(words, part, next.codes, lane);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            const uint4 b = x[f][t / 2];
            multiply_tile(sum[f], a, t % 2 ? b.z : b.x, t % 2 ? b.w : b.y);
        }
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) save(out + f * 128, sum[f], lane);
}

// Adds the warps' sums of a round and writes them out; `scale` is that of this thread's first row.
__device__ __forceinline__ void finish_round(const Problem &problem, const Segment &segment, const float *sums, int row, int rows, int round_rows,
                                             u16 scale) {
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) {
        const int r = (row + i / SUMS) * 16 + i % 16, column = i % SUMS / 16;
        if (r >= segment.rows || column >= problem.batch) continue;
        if (i >= THREADS) scale = segment.scales[r];
        float value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += sums[w * round_rows * SUMS + i];
        store(problem, column, segment.out_offset + r, value * problem.x_scales[column] * half_to_float(scale));
    }
}

template <class D>
__device__ void multiply_segment(const Problem &problem, const Segment &segment) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const int row_begin = (blockIdx.x - segment.first_block) * segment.rows_per_block;
    Walk<D> at(problem, segment, warp, row_begin, min(row_begin + segment.rows_per_block, segment.row_tiles));
    float *sums = (float *)(shared + TABLE_BYTES), *own = sums + warp * at.round_rows * SUMS;
    const u8 *x_lane = problem.x + (lane / 4 % COLUMNS * 4 + lane % 4) * 16;  // absent columns repeat one that is there
    const u32 unit = segment.hash_unit;

    u32 words[D::WORDS];
    if (at.left) D::load(words, at.codes, lane);
    D::fill(shared, segment.entries);
    for (bool first = true;; first = false) {
        Walk<D> next = at;
        const int row = at.row, rows = at.rows;
        const int scale_row = row * 16 + threadIdx.x / SUMS * 16 + threadIdx.x % 16;
        const u16 scale = scale_row < segment.rows ? segment.scales[scale_row] : 0;
        for (int i = lane; i < rows * SUMS; i += 32) own[i] = 0;
        if (first) wait_for_previous_kernel();
        __syncthreads();  // the table is there, and this warp's zeros
        uint4 x[FRAGMENTS][PAIRS];
        int x_chunk = -1;
        while (at.left) {
            if (at.chunk != x_chunk) {
#pragma unroll
                for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
                    for (int f = 0; f < FRAGMENTS; f++)
                        x[f][pair] = *(const uint4 *)(x_lane + (size_t)at.chunk * X_CHUNK + pair * X_PAIR + f * (64 * COLUMNS));
                x_chunk = at.chunk;
            }
            next.advance();
            if (next.left == 0 && !next.last_round()) next.start(row + at.round_rows);
            multiply_item<D>(own + at.tile * SUMS, words, next, x, lane, unit);
            at = next;
            if (at.row != row) break;
        }
        __syncthreads();
        finish_round(problem, segment, sums, row, rows, at.round_rows, scale);
        if (row + at.round_rows >= at.block_end) break;
        if (at.row == row) {  // this warp had nothing to do, and could not look ahead
            at.start(row + at.round_rows);
            if (at.left) D::load(words, at.codes, lane);
        }
        __syncthreads();
    }
}

template <class... D>
__device__ __forceinline__ void dispatch(const Problem &problem, const Segment &segment) {
    int index = 0;
    ((segment.decoder == index++ ? multiply_segment<D>(problem, segment) : (void)0), ...);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply(const __grid_constant__ Problem problem) {
    let_next_kernel_start();
    int index = 0;
    while (index + 1 < problem.segment_count && (int)blockIdx.x >= problem.segments[index + 1].first_block) index++;
    dispatch<DECODERS>(problem, problem.segments[index]);
}
