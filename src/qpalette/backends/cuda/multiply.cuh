// What kernels that multiply by decoded tiles share: a warp's way through its part of a matrix, and the sums of a block.
//
// A block owns some 16-row tiles of one matrix. Its (chunk of columns, row tile) items are one list, cut evenly over the
// warps. A warp keeps its chunk of x' in registers for all rows, and refills its registers of packed bits, part by part,
// with the next item's as soon as their last tile is decoded. Its sums are added to the block's in shared memory as integers
// in fixed point: in any order the same bits, and one set of sums for all warps, so that x' is read once for all rows. (A
// set per warp took rows in rounds, and read x' in each: 75 instead of 62 us for a Llama-3.1-8B layer at batch 16.)
//
// Compile-time constants: THREADS, TABLE_BYTES, BATCH (columns of x': 1, 2, 4, 8 or 16), DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int FRAGMENTS = BATCH > 8 ? 2 : 1;    // of eight columns
constexpr int COLUMNS = BATCH > 8 ? 8 : BATCH;  // of x' in each
constexpr int PAIRS = CHUNK / 2;                // of tiles: what a lane loads of x' at once
constexpr int SUMS = 16 * BATCH;                // of a row tile, [column][row]

extern __shared__ __align__(16) u8 shared[];  // table, then sums [row tiles][SUMS]

// Adds a lane's four sums of a fragment to the block's; lanes whose columns are not there leave them alone. No branch: code
// behind a divergent one loses the uniform registers, which cost every look-up an instruction.
__device__ __forceinline__ void add(int *sums, const float (&sum)[4], float fixed_point, u32 lane) {
    const u32 address = (u32)__cvta_generic_to_shared(sums + lane % 4 * 32 + lane / 4), wanted = lane % 4 * 2 < COLUMNS;
    int fixed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) fixed[i] = __float2int_rn(sum[i] * fixed_point);
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0;\n@p red.shared.add.s32 [%0], %1;\n@p red.shared.add.s32 [%0 + 32], %2;}"
        :: "r"(address), "r"(fixed[0]), "r"(fixed[2]), "r"(wanted) : "memory");
    if (COLUMNS > 1)
        asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0;\n@p red.shared.add.s32 [%0 + 64], %1;\n@p red.shared.add.s32 [%0 + 96], %2;}"
            :: "r"(address), "r"(fixed[1]), "r"(fixed[3]), "r"(wanted) : "memory");
}

// A warp's way through its items, which count the rows of a chunk fastest: so that a chunk of x' is loaded once for all.
template <class D>
struct Walk {
    const u8 *base;
    size_t row_bytes;  // from a row tile to the next
    int rows;
    int chunk, tile, left;  // the item, and how many are left
    const u8 *codes;

    // `rows` row tiles of a matrix of so many chunks, from tile `row` on.
    __device__ Walk(const u8 *matrix, int chunks, int warp, int row, int rows) : row_bytes((size_t)chunks * D::CHUNK_BYTES), rows(rows) {
        base = matrix + row * row_bytes;
        const int items = rows * chunks, begin = items * warp / WARPS;
        chunk = begin / rows, tile = begin % rows, left = items * (warp + 1) / WARPS - begin;
        point();
    }
    __device__ void point() { codes = base + tile * row_bytes + (size_t)chunk * D::CHUNK_BYTES; }
    __device__ void advance() {
        left--;
        if (++tile == rows) tile = 0, chunk++;
        point();
    }
};

// One item: 16 tiles decoded and multiplied. A part of the packed bits is replaced by `next`'s after its last tile: without
// a branch where decoding is what takes the time, and with one where it is the loads (us of a Llama-3.1-8B layer's gate and
// up, batch 1, with and without: nuq-3 18.2 and 20.1, tcq2-3 22.2 and 21.7).
template <class D>
__device__ __forceinline__ void multiply_item(int *sums, float fixed_point, u32 (&words)[D::WORDS], const Walk<D> &next,
                                              const uint4 (&x)[FRAGMENTS][PAIRS], u32 lane, u32 unit) {
    float sum[FRAGMENTS][4] = {};
    const u8 *codes = next.codes;
    u32 wanted = next.left != 0;
    asm volatile("" : "+l"(codes), "+r"(wanted));  // computed here, once: the compiler would do it again for every part
#pragma unroll
    for (int t = 0; t < CHUNK; t++) {
        u32 a[4];
        D::decode(a, words, t, lane, unit, shared);
#pragma unroll
        for (int part = 0; part < D::PARTS; part++)
            if (D::last_tile(part) == t && (D::HASHED || wanted)) D::load_part(words, part, codes, lane, D::HASHED ? wanted : 1);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            const uint4 b = x[f][t / 2];
            multiply_tile(sum[f], a, t % 2 ? b.z : b.x, t % 2 ? b.w : b.y);
        }
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) add(sums + f * 128, sum[f], fixed_point, lane);
}

// A chunk of x' into registers; its tiles' pairs, and fragments, lie so many bytes from each other.
template <int PAIR_BYTES, int FRAGMENT_BYTES>
__device__ __forceinline__ void load_x(uint4 (&x)[FRAGMENTS][PAIRS], const u8 *chunk) {
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) x[f][pair] = *(const uint4 *)(chunk + pair * PAIR_BYTES + f * FRAGMENT_BYTES);
}
