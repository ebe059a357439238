// What kernels that multiply by decoded tiles share: a warp's way through its part of a matrix, and the sums of a block.
//
// A block owns some 16-row tiles of one matrix. Its (chunk of columns, row tile) items are one list, cut evenly over the
// warps. A warp keeps its chunk of x' in registers for all rows, and refills its registers of packed bits, part by part,
// with the next item's as soon as their last tile is decoded. Its sums are added to the block's in shared memory as integers
// in fixed point: in any order the same bits, and one set of sums for all warps, so that x' is read once for all rows. (A
// set per warp took rows in rounds, and read x' in each: 75 instead of 62 us for a Llama-3.1-8B layer at batch 16.)
//
// 64 registers hold 16 columns of a chunk of x'. Of more columns a warp has a part of every chunk, and the warps of a team,
// CUTS of them, walk the same items side by side.
//
// Compile-time constants: THREADS, TABLE_BYTES, BATCH (columns of x': 1, 2, 4, 8, 16, 24 or 32), DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int CUTS = (BATCH + 15) / 16;         // of a chunk
constexpr int TEAMS = WARPS / CUTS;
constexpr int TILES = CHUNK / CUTS;             // that a warp multiplies of a chunk
constexpr int PAIRS = TILES / 2;                // of them: what a lane loads of x' at once
constexpr int FRAGMENTS = (BATCH + 7) / 8;      // of eight columns
constexpr int COLUMNS = BATCH > 8 ? 8 : BATCH;  // of x' in each
constexpr int SUMS = 16 * BATCH;                // of a row tile
static_assert(CHUNK % (2 * CUTS) == 0 && WARPS % CUTS == 0, "parts of a chunk are alike, and whole teams");

extern __shared__ __align__(16) u8 shared[];  // table, then sums [row tiles][SUMS]

// What the sum at place i of a row tile's is of. Of one fragment [column][row]; of more, whose sums are many, so that a warp adds
// to 32 banks at once: [fragment][half of rows][column % 2][column / 2][row].
__device__ __forceinline__ int row_of(int i) { return FRAGMENTS > 1 ? i / 64 % 2 * 8 + i % 8 : i % 16; }
__device__ __forceinline__ int column_of(int i) { return FRAGMENTS > 1 ? i / 128 * 8 + i / 8 % 4 * 2 + i / 32 % 2 : i / 16; }

// Adds a lane's four sums of a fragment to the block's; lanes whose columns are not there leave them alone. No branch: code
// behind a divergent one loses the uniform registers, which cost every look-up an instruction.
__device__ __forceinline__ void add(int *sums, const float (&sum)[4], float fixed_point, u32 lane) {
    constexpr int to_column = FRAGMENTS > 1 ? 128 : 64, to_half = FRAGMENTS > 1 ? 256 : 32;  // bytes: to the next one
    const u32 address = (u32)__cvta_generic_to_shared(sums + lane % 4 * (FRAGMENTS > 1 ? 8 : 32) + lane / 4);
    const u32 wanted = lane % 4 * 2 < COLUMNS;
    int fixed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) fixed[i] = __float2int_rn(sum[i] * fixed_point);
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0;\n@p red.shared.add.s32 [%0], %1;\n@p red.shared.add.s32 [%0 + %4], %2;}"
        :: "r"(address), "r"(fixed[0]), "r"(fixed[2]), "r"(wanted), "n"(to_half) : "memory");
    if (COLUMNS > 1)
        asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0;\n@p red.shared.add.s32 [%0 + %4], %1;\n@p red.shared.add.s32 [%0 + %5], %2;}"
            :: "r"(address), "r"(fixed[1]), "r"(fixed[3]), "r"(wanted), "n"(to_column), "n"(to_column + to_half) : "memory");
}

// A team's way through its items, which count the rows of a chunk fastest: so that a chunk of x' is loaded once for all.
template <class D>
struct Walk {
    const u8 *base;
    size_t row_bytes;  // from a row tile to the next
    int rows;
    int chunk, tile, left;  // the item, and how many are left
    const u8 *codes;

    // `rows` row tiles of a matrix of so many chunks, from tile `row` on.
    __device__ Walk(const u8 *matrix, int chunks, int team, int row, int rows) : row_bytes((size_t)chunks * D::CHUNK_BYTES), rows(rows) {
        base = matrix + row * row_bytes;
        const int items = rows * chunks, begin = items * team / TEAMS;
        chunk = begin / rows, tile = begin % rows, left = items * (team + 1) / TEAMS - begin;
        point();
    }
    __device__ void point() { codes = base + tile * row_bytes + (size_t)chunk * D::CHUNK_BYTES; }
    __device__ void advance() {
        left--;
        if (++tile == rows) tile = 0, chunk++;
        point();
    }
};

// Whether part `cut` of a chunk has bits in `part` of the packed ones.
template <class D>
__device__ constexpr bool has_bits(int cut, int part) {
    const int bits = TILES * D::EIGHTHS;
    return D::words_before(part) * 32 < (cut + 1) * bits && D::words_before(part + 1) * 32 > cut * bits;
}

// One item: the tiles of a part of a chunk decoded and multiplied. A part of the packed bits is replaced by `next`'s after its
// last tile: without a branch where decoding is what takes the time, and with one where it is the loads (us of a Llama-3.1-8B
// layer's gate and up, batch 1, with and without: nuq-3 18.2 and 20.1, tcq2-3 22.2 and 21.7).
template <class D, int CUT = 0>
__device__ __forceinline__ void multiply_item(int *sums, float fixed_point, u32 (&words)[D::WORDS], const Walk<D> &next,
                                              const uint4 (&x)[FRAGMENTS][PAIRS], u32 lane, u32 unit) {
    float sum[FRAGMENTS][4] = {};
    const u8 *codes = next.codes;
    u32 wanted = next.left != 0;
    asm volatile("" : "+l"(codes), "+r"(wanted));  // computed here, once: the compiler would do it again for every part
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int tile = CUT * TILES + i;
        u32 a[4];
        D::decode(a, words, tile, lane, unit, shared);
#pragma unroll
        for (int part = 0; part < D::PARTS; part++) {
            const bool last = D::last_tile(part) == tile || (i == TILES - 1 && D::last_tile(part) > tile);
            if (last && has_bits<D>(CUT, part) && (D::HASHED || wanted)) D::load_part(words, part, codes, lane, D::HASHED ? wanted : 1);
        }
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            const uint4 b = x[f][i / 2];
            multiply_tile(sum[f], a, i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
        }
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) add(sums + f * 128, sum[f], fixed_point, lane);
}

// A chunk of x', or a part of one, into registers; its tiles' pairs, and fragments, lie so many bytes from each other.
template <int PAIR_BYTES, int FRAGMENT_BYTES>
__device__ __forceinline__ void load_x(uint4 (&x)[FRAGMENTS][PAIRS], const u8 *chunk) {
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) x[f][pair] = *(const uint4 *)(chunk + pair * PAIR_BYTES + f * FRAGMENT_BYTES);
}
