// What kernels that multiply decoded tiles by many columns share: a ring of x' in shared memory, a warp's way through its part
// of a matrix, and its sums. In multiply.cuh a warp has its chunk of x' in registers, which hold 16 columns.
//
// A block has some row tiles and a run of chunks of one matrix. A warp has a group of ROW_TILES row tiles from the first chunk
// to the last, or, where there are fewer groups than warps, a part of the chunks: every so manieth. What it decodes, it multiplies
// with all columns, and what it reads of x' with all its row tiles: of one, a chunk is 64 look-ups of pairs, and at 64 columns
// 256 reads of as many bytes of x'. Sums are integers in fixed point, as in multiply.cuh, a chunk at a time: the same bits in
// any cut. They stay in registers to the last chunk: look-ups and x' keep shared memory busy.
//
// Compile-time constants: THREADS, TABLE_BYTES, BATCH (columns of x': a multiple of 8), ROW_TILES, STAGES, DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int FRAGMENTS = BATCH / 8;             // of eight columns
constexpr int PAIRS = CHUNK / 2;                 // of tiles
constexpr int FRAGMENT_BYTES = 512;              // of x' for a pair of tiles: 16 of a lane
constexpr int FRAGMENT_SUMS = 128;               // of a row tile: four of a lane
constexpr int SUMS = FRAGMENTS * FRAGMENT_SUMS;  // of a row tile, [fragment][half of rows][column % 2][column / 2][row]
constexpr int STAGE_BYTES = PAIRS * FRAGMENTS * FRAGMENT_BYTES;  // a chunk of x': [pair][fragment][lane]

extern __shared__ __align__(128) u8 shared[];  // table, control, ring [STAGES][STAGE_BYTES]; at the end, over the ring, sums [row tiles][SUMS]

struct Control {
    unsigned long long there[STAGES];  // barriers: completed when a chunk has come
    int left[STAGES];                  // how many warps are done with it
};
constexpr int CONTROL_BYTES = 128;
static_assert(sizeof(Control) <= CONTROL_BYTES, "the control of a ring has its room");

constexpr int RING = TABLE_BYTES + CONTROL_BYTES;

__device__ __forceinline__ u32 address_of(const void *place) { return (u32)__cvta_generic_to_shared(place); }

// A warp's way through the chunks of x' of its part: every so manieth, in order. A part has a ring of its own, of an equal number
// of the block's stages, and each of its chunks is awaited and left by all of its warps: so none of them is more than a phase of
// a barrier behind, which is as far as waiting by parity tells phases apart.
struct Ring {
    const u8 *x;  // the block's first chunk
    int chunks;   // of the block
    int parts;    // of the chunks, at most STAGES
    int users;    // warps of a part
    int depth;    // stages of a part
    int first;    // of them
    int chunk;    // the present one,
    int stage;    // where it is,
    u32 phase = 0;  // and of its barrier

    __device__ Ring(const u8 *x, int chunks, int parts, int users, int part)
        : x(x), chunks(chunks), parts(parts), users(users), depth(STAGES / parts), first(part * depth), chunk(part), stage(first) {}

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

    // The first chunks of all parts, as many as there is room for, in order, by a whole warp.
    __device__ __forceinline__ void begin(u32 lane) const {
        for (int i = 0; i < min(depth * parts, chunks); i++) fetch(i, i % parts * depth + i / parts, lane);
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
        int *left = &control().left[stage], before = 0;
        __syncwarp();
        if (lane == 0) {
            __threadfence_block();
            before = atomicAdd(left, 1);
        }
        if (__shfl_sync(~0u, before, 0) == users - 1) {
            const int next = chunk + depth * parts;
            if (lane == 0) *left = 0;
            __threadfence_block();
            if (next < chunks) fetch(next, stage, lane);
        }
        chunk += parts;
        if (++stage == first + depth) stage = first, phase ^= 1;
    }
};

// Which of a block's `rows` row tiles and `count` chunks a warp has.
struct Share {
    int groups, parts;  // of row tiles, at most WARPS; of chunks
    int group, part;
    int left;  // how many chunks of the part there are

    __device__ Share(int rows, int count, int warp) {
        groups = (rows + ROW_TILES - 1) / ROW_TILES, parts = min(WARPS / groups, STAGES);
        group = warp % groups, part = warp / groups;
        left = part < parts && part < count ? (count - part + parts - 1) / parts : 0;
    }
};

// Where the packed bits of an item are: a group of row tiles and a chunk.
struct Codes {
    const u8 *first;  // of the first row tile
    size_t further;   // to the next row tile; 0 where there is none, and the last counts again
};
static_assert(ROW_TILES == 1 || ROW_TILES == 2, "an item lacks one row tile at most");

template <class D>
__device__ __forceinline__ void load_item(u32 (&words)[ROW_TILES][D::WORDS], const Codes &codes, u32 lane) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) D::load(words[r], codes.first + r * codes.further, lane);
}

typedef int Sums[ROW_TILES][FRAGMENTS][4];  // of a lane

// One item: 16 tiles of ROW_TILES row tiles, decoded and multiplied by the chunk of x' at `x`. A part of the packed bits is
// replaced by that at `codes`, the next item's, after its last tile, where it is `wanted`.
template <class D>
__device__ __forceinline__ void multiply_item(Sums &sums, float fixed_point, u32 (&words)[ROW_TILES][D::WORDS], Codes codes,
                                              u32 wanted, const u8 *x, u32 lane, u32 unit, u32 copy) {
    float sum[ROW_TILES][FRAGMENTS][4] = {};
    const uint4 *x_lane = (const uint4 *)x + lane;
    asm volatile("" : "+l"(codes.first), "+l"(codes.further), "+r"(wanted));  // computed here, once: the compiler would do it again for every part
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
                    if (D::last_tile(part) == 2 * pair + t) D::load_part(words[r], part, codes.first + r * codes.further, lane, wanted);
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
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[r][f][i] += __float2int_rn(sum[r][f][i] * fixed_point);
}

// A lane's sums to the block's, of its group: those of the first part are stored, those of others added. Without conflicts.
template <bool FIRST>
__device__ __forceinline__ void give_sums(const Sums &sums, int *block_sums, u32 lane) {
    int *place = block_sums + lane % 4 * 8 + lane / 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int *sum = place + r * SUMS + f * FRAGMENT_SUMS + i * 32;
                if (FIRST) *sum = sums[r][f][i];
                else atomicAdd(sum, sums[r][f][i]);
            }
}
