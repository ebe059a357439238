// What kernels that multiply decoded tiles by many columns share: a ring of x' in shared memory, a warp's way through its part
// of a matrix, and the sums of a block. In multiply.cuh a warp has its chunk of x' in registers, which hold 16 columns.
//
// A block has some row tiles and a run of chunks of one matrix. Its items are ROW_TILES row tiles and a chunk; warps take turns
// at them, the rows of a chunk first, so that few chunks of x' are in use at once. What a warp decodes, it multiplies with all
// columns, and what it reads of x' with all its row tiles: of one, a chunk is 64 look-ups of pairs, and at 64 columns 256 reads
// of as many bytes of x'. Sums are integers in fixed point, as in multiply.cuh, a chunk at a time: the same bits in any cut.
//
// Compile-time constants: THREADS, TABLE_BYTES, BATCH (columns of x': a multiple of 8), ROW_TILES, STAGES, DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int FRAGMENTS = BATCH / 8;             // of eight columns
constexpr int PAIRS = CHUNK / 2;                 // of tiles
constexpr int FRAGMENT_BYTES = 512;              // of x' for a pair of tiles: 16 of a lane
constexpr int FRAGMENT_SUMS = 128;               // of a row tile: four of a lane
constexpr int SUMS = FRAGMENTS * FRAGMENT_SUMS;  // of a row tile, [fragment][half of rows][column % 2][column / 2][row]
constexpr int STAGE_BYTES = PAIRS * FRAGMENTS * FRAGMENT_BYTES;  // a chunk of x': [pair][fragment][lane]

extern __shared__ __align__(128) u8 shared[];  // table, control, ring [STAGES][STAGE_BYTES], sums [row tiles][SUMS]

struct Control {
    unsigned long long there[STAGES];  // barriers: completed when a chunk has come
    int left[STAGES];                  // how many warps are done with it
};
constexpr int CONTROL_BYTES = 128;
static_assert(sizeof(Control) <= CONTROL_BYTES, "the control of a ring has its room");

constexpr int RING = TABLE_BYTES + CONTROL_BYTES;
constexpr int SUMS_AT = RING + STAGES * STAGE_BYTES;

__device__ __forceinline__ u32 address_of(const void *place) { return (u32)__cvta_generic_to_shared(place); }

// A block's way through its chunks of x', which come in order, each into the stage of the one STAGES before it.
struct Ring {
    const u8 *x;    // the first chunk
    int chunks;     // how many there are
    int chunk = 0;  // the present one,
    int stage = 0;  // and where it is
    u32 phase = 0;  // of its barrier

    __device__ Ring(const u8 *x, int chunks) : x(x), chunks(chunks) {}

    static __device__ __forceinline__ Control &control() { return *(Control *)(shared + TABLE_BYTES); }
    __device__ __forceinline__ const u8 *values() const { return shared + RING + stage * STAGE_BYTES; }

    // By one thread of the block, ahead of a barrier of all.
    static __device__ __forceinline__ void prepare() {
        constexpr int arrivals = __CUDA_ARCH__ >= 900 ? 1 : 32;
        for (int i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(address_of(&control().there[i])), "r"(arrivals) : "memory");
            control().left[i] = 0;
        }
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // the copies see it
#endif
    }

    // Asks for a chunk, by a whole warp.
    __device__ __forceinline__ void fetch(int chunk, int stage, u32 lane) const {
        const u32 there = address_of(&control().there[stage]), to = address_of(shared + RING + stage * STAGE_BYTES);
        const u8 *from = x + (size_t)chunk * STAGE_BYTES;
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(there), "r"(STAGE_BYTES) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                :: "r"(to), "l"(from), "r"(STAGE_BYTES), "r"(there) : "memory");
        }
#else
#pragma unroll 8
        for (u32 i = lane * 16; i < STAGE_BYTES; i += 512)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to + i), "l"(from + i) : "memory");
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(there) : "memory");
#endif
    }

    // The first chunks, as many as there is room for, by a whole warp.
    __device__ __forceinline__ void begin(u32 lane) const {
        for (int i = 0; i < min(STAGES, chunks); i++) fetch(i, i, lane);
    }

    // Until the present chunk is there.
    __device__ __forceinline__ void wait() const {
        const u32 there = address_of(&control().there[stage]);
        u32 done = 0;
        while (!done) {
#if __CUDA_ARCH__ >= 900
            asm volatile("{.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;}"
                : "=r"(done) : "r"(there), "r"(phase) : "memory");
#else
            asm volatile("{.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;}"
                : "=r"(done) : "r"(there), "r"(phase) : "memory");
#endif
        }
    }

    // Goes on to the next chunk. The last warp to do so asks for what takes the present one's place: nobody waits for it.
    __device__ __forceinline__ void advance(u32 lane) {
        int before = 0;
        __syncwarp();
        if (lane == 0) {
            __threadfence_block();
            before = atomicAdd(&control().left[stage], 1);
        }
        if (__shfl_sync(~0u, before, 0) == WARPS - 1) {
            if (lane == 0) control().left[stage] = 0;
            __threadfence_block();
            if (chunk + STAGES < chunks) fetch(chunk + STAGES, stage, lane);
        }
        chunk++;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// A warp's way through its items: every WARPS-th of a block's.
template <class D>
struct Items {
    const u8 *base;    // codes of the block's first row tile and chunk
    size_t row_bytes;  // from a row tile to the next
    int rows, groups;  // row tiles, and groups of ROW_TILES
    int chunk, group;  // the item
    int left;          // how many there are, with this one
    const u8 *codes;
    size_t further;  // from a row tile of the item to the next; 0 where there is none, and the last counts again

    // `rows` row tiles of a matrix of so many chunks, from tile `row` on, and `count` chunks from `first` on.
    __device__ Items(const u8 *matrix, int chunks, int row, int rows, int first, int count, int warp)
        : row_bytes((size_t)chunks * D::CHUNK_BYTES), rows(rows), groups((rows + ROW_TILES - 1) / ROW_TILES) {
        base = matrix + row * row_bytes + (size_t)first * D::CHUNK_BYTES;
        left = (groups * count - warp + WARPS - 1) / WARPS, chunk = 0, group = warp;
        point();
    }
    __device__ __forceinline__ void point() {
        chunk += group / groups, group %= groups;
        codes = base + (size_t)(group * ROW_TILES) * row_bytes + (size_t)chunk * D::CHUNK_BYTES;
        further = group * ROW_TILES + 1 < rows ? row_bytes : 0;
    }
    __device__ __forceinline__ void advance() {
        left--, group += WARPS;
        point();
    }
};
static_assert(ROW_TILES == 1 || ROW_TILES == 2, "an item lacks one row tile at most");

template <class D>
__device__ __forceinline__ void load_item(u32 (&words)[ROW_TILES][D::WORDS], const Items<D> &item, u32 lane) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) D::load(words[r], item.codes + r * item.further, lane);
}

// Adds a lane's four sums of a fragment to the block's: without conflicts.
__device__ __forceinline__ void add_fragment(u32 sums, const float (&sum)[4], float fixed_point) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("red.shared.add.s32 [%0], %1;" :: "r"(sums + i * 128), "r"(__float2int_rn(sum[i] * fixed_point)) : "memory");
}

// One item: 16 tiles of ROW_TILES row tiles, decoded and multiplied by the chunk of x' at `x`. A part of the packed bits is
// replaced by `next`'s after its last tile.
template <class D>
__device__ __forceinline__ void multiply_item(int *sums, float fixed_point, u32 (&words)[ROW_TILES][D::WORDS], const Items<D> &next,
                                              const u8 *x, u32 lane, u32 unit, u32 copy) {
    float sum[ROW_TILES][FRAGMENTS][4] = {};
    const uint4 *x_lane = (const uint4 *)x + lane;
    const u8 *codes = next.codes;
    size_t further = next.further;
    u32 wanted = next.left > 0;
    asm volatile("" : "+l"(codes), "+l"(further), "+r"(wanted));  // computed here, once: the compiler would do it again for every part
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        u32 a[ROW_TILES][2][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int t = 0; t < 2; t++) {
                D::decode(a[r][t], words[r], 2 * pair + t, lane, unit, shared, copy);
#pragma unroll
                for (int part = 0; part < D::PARTS; part++)
                    if (D::last_tile(part) == 2 * pair + t) D::load_part(words[r], part, codes + r * further, lane, wanted);
            }
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            const uint4 b = x_lane[(pair * FRAGMENTS + f) * 32];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) multiply_tile(sum[r][f], a[r][0], b.x, b.y);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) multiply_tile(sum[r][f], a[r][1], b.z, b.w);
        }
    }
    const u32 place = address_of(sums) + (lane % 4 * 8 + lane / 4) * 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) add_fragment(place + (r * SUMS + f * FRAGMENT_SUMS) * 4, sum[r][f], fixed_point);
}
