// What kernels that multiply decoded tiles by many columns share: a ring of x' in shared memory, a warp's way through its part
// of a matrix, and its sums. In multiply.cuh a warp has its chunk of x' in registers, which hold 16 columns.
//
// A block has some row tiles and a run of chunks of one matrix. A warp has a group of ROW_TILES row tiles from the first chunk
// to the last, or, where there are fewer groups than warps, a part of the chunks: every so manieth. What it decodes, it multiplies
// with all columns, and what it reads of x' with all its row tiles: of one, a chunk is 64 look-ups of pairs, and at 64 columns
// 256 reads of as many bytes of x'. Sums are integers in fixed point, as in multiply.cuh, a chunk at a time: the same bits in
// any cut. They stay in registers to the last chunk: look-ups and x' keep shared memory busy.
//
// With WGMMA (compute capability 9.0) four warps are a team: what each has decoded of a row tile is in its registers, and one
// instruction multiplies all four by columns that it reads from shared memory itself, once, while the next tiles are decoded.
//
// Compile-time constants: THREADS, TABLE_BYTES, BATCH (columns of x': a multiple of 8), ROW_TILES (1 with WGMMA), STAGES, WGMMA,
// DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int TEAM = WGMMA ? 4 : 1;              // warps that multiply together
constexpr int GROUP_TILES = TEAM * ROW_TILES;    // row tiles of a group
constexpr int FRAGMENTS = BATCH / 8;             // of eight columns
constexpr int PAIRS = CHUNK / 2;                 // of tiles
constexpr int FRAGMENT_BYTES = 512;              // of x' for a pair of tiles: 16 of a lane
constexpr int FRAGMENT_SUMS = 128;               // of a row tile: four of a lane
constexpr int SUMS = FRAGMENTS * FRAGMENT_SUMS;  // of a row tile, [fragment][half of rows][column % 2][column / 2][row]
constexpr int STAGE_BYTES = PAIRS * FRAGMENTS * FRAGMENT_BYTES;  // a chunk of x': [pair][fragment], see rotate.cu

extern __shared__ __align__(128) u8 shared[];  // table, control, ring [STAGES][STAGE_BYTES]; at the end, over the ring, sums [row tiles][SUMS]

struct Control {
    unsigned long long there[STAGES];  // barriers: completed when a chunk has come
    int left[STAGES];                  // how many warps are done with it
    int parts, depth, users;           // of the chunks; stages and warps of each: here, as registers are few
};
constexpr int CONTROL_BYTES = 128;
static_assert(sizeof(Control) <= CONTROL_BYTES, "the control of a ring has its room");

constexpr int RING = TABLE_BYTES + CONTROL_BYTES;

__device__ __forceinline__ u32 address_of(const void *place) { return (u32)__cvta_generic_to_shared(place); }

// Which of a block's `rows` row tiles and `count` chunks a warp has.
struct Share {
    int groups, parts;  // of row tiles, at most as many as teams; of chunks, at most STAGES
    int depth;          // stages of a part
    int row, part;
    int left;  // how many chunks of the part there are

    __device__ Share(int rows, int count, int warp) {
        const int team = warp / TEAM;
        groups = (rows + GROUP_TILES - 1) / GROUP_TILES, parts = min(WARPS / TEAM / groups, STAGES), depth = STAGES / parts;
        row = (team % groups * TEAM + warp % TEAM) * ROW_TILES, part = team / groups;
        left = part < parts && part < count ? (count - part + parts - 1) / parts : 0;
    }
};

// A warp's way through the chunks of x' of its part: every so manieth, in order. A part has a ring of its own, of an equal number
// of the block's stages, and each of its chunks is awaited and left by all of its warps: so none of them is more than a phase of
// a barrier behind, which is as far as waiting by parity tells phases apart.
struct Ring {
    const u8 *next;  // the chunk that takes the place of the present one
    int left;        // chunks of the part, from the present one on
    int stage;       // where the present one is,
    int turn = 0;    // which of the part's that is,
    u32 phase = 0;   // and of its barrier

    // Of the block's chunks from x on.
    __device__ Ring(const u8 *x, const Share &own)
        : next(x + (size_t)(own.part + own.depth * own.parts) * STAGE_BYTES), left(own.left), stage(own.part * own.depth) {}

    static __device__ __forceinline__ Control &control() { return *(Control *)(shared + TABLE_BYTES); }
    __device__ __forceinline__ const u8 *values() const { return shared + RING + stage * STAGE_BYTES; }

    // By one thread of the block, ahead of a barrier of all.
    static __device__ __forceinline__ void prepare(const Share &own) {
        control().parts = own.parts, control().depth = own.depth, control().users = own.groups * TEAM;
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
    static __device__ __forceinline__ void fetch(const u8 *from, int stage, u32 lane) {
        const u32 there = address_of(&control().there[stage]), to = address_of(shared + RING + stage * STAGE_BYTES);
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
    static __device__ __forceinline__ void begin(const u8 *x, int chunks, const Share &own, u32 lane) {
        for (int i = 0; i < min(own.depth * own.parts, chunks); i++)
            fetch(x + (size_t)i * STAGE_BYTES, i % own.parts * own.depth + i / own.parts, lane);
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
        int *gone = &control().left[stage], before = 0;
        const int depth = control().depth;
        __syncwarp();
        if (lane == 0) {
            __threadfence_block();
            before = atomicAdd(gone, 1);
        }
        if (__shfl_sync(~0u, before, 0) == control().users - 1) {
            if (lane == 0) *gone = 0;
            __threadfence_block();
            if (left > depth) fetch(next, stage, lane);
        }
        next += control().parts * STAGE_BYTES, left--, stage++;
        if (++turn == depth) turn = 0, stage -= depth, phase ^= 1;
    }
};

// Where the packed bits of an item are: a group of row tiles and a chunk.
struct Codes {
    const u8 *first;  // of the first row tile
    size_t further;   // to the next row tile; 0 where there is none, and the last counts again
};
static_assert(WGMMA ? ROW_TILES == 1 : ROW_TILES <= 2, "an item lacks one row tile at most, a warp of a team its only one");
static_assert(THREADS % (32 * TEAM) == 0, "teams are whole");

template <class D>
__device__ __forceinline__ void load_item(u32 (&words)[ROW_TILES][D::WORDS], const Codes &codes, u32 lane) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) D::load(words[r], codes.first + r * codes.further, lane);
}

typedef int Sums[ROW_TILES][FRAGMENTS][4];  // of a lane

#if WGMMA
constexpr int CORE_BYTES = 128;            // eight inputs of eight columns, 16 bytes a column
constexpr int TILE_BYTES = 2 * CORE_BYTES;  // of a fragment

// What the instruction is told of columns at an address of shared memory: 16 inputs are two cores side by side, the next eight
// columns are a fragment further. In units of 16 bytes: address, distance of the cores, distance of the fragments.
__device__ __forceinline__ unsigned long long columns_at(u32 address) {
    return (unsigned long long)(address / 16) | (unsigned long long)(CORE_BYTES / 16) << 16 | (unsigned long long)(FRAGMENT_BYTES / 16) << 32;
}

// The registers that an instruction has read until now may be written again.
__device__ __forceinline__ void release(u32 (&a)[ROW_TILES][2][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) asm volatile("" : "+r"(a[0][i / 4][i % 4]) :: "memory");
}
#endif

// A pair of tiles of each of ROW_TILES row tiles. A part of the packed bits is replaced by that at `codes`, the next item's,
// after its last tile, where it is `wanted`.
template <class D>
__device__ __forceinline__ void decode_pair(u32 (&a)[ROW_TILES][2][4], u32 (&words)[ROW_TILES][D::WORDS], int pair, const Codes &codes,
                                            u32 wanted, u32 lane, u32 unit, u32 copy) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int t = 0; t < 2; t++) {
            D::decode(a[r][t], words[r], 2 * pair + t, lane, unit, shared, copy);
#pragma unroll
            for (int part = 0; part < D::PARTS; part++)
                if (D::last_tile(part) == 2 * pair + t) D::load_part(words[r], part, codes.first + r * codes.further, lane, wanted);
        }
}

// One item: 16 tiles of ROW_TILES row tiles, decoded and multiplied by the chunk of x' at `x`.
template <class D>
__device__ __forceinline__ void multiply_item(Sums &sums, float fixed_point, u32 (&words)[ROW_TILES][D::WORDS], Codes codes,
                                              u32 wanted, const u8 *x, u32 lane, u32 unit, u32 copy) {
    asm volatile("" : "+l"(codes.first), "+l"(codes.further), "+r"(wanted));  // computed here, once: the compiler would do it again for every part
#if WGMMA
    float sum[ROW_TILES][FRAGMENTS][4];
    u32 a[2][ROW_TILES][2][4];
    const unsigned long long columns = columns_at(address_of(x));
    decode_pair<D>(a[0], words, 0, codes, wanted, lane, unit, copy);
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int t = 0; t < 2; t++)
            multiply_tile_of_team(sum[0], a[pair % 2][0][t], columns + (pair * FRAGMENTS * FRAGMENT_BYTES + t * TILE_BYTES) / 16, pair + t > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (pair + 1 == PAIRS) break;
        if (pair > 0) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            release(a[1 - pair % 2]);
        }
        decode_pair<D>(a[1 - pair % 2], words, pair + 1, codes, wanted, lane, unit, copy);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(a[0]), release(a[1]);
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(sum[0][f][i]) :: "memory");
#else
    float sum[ROW_TILES][FRAGMENTS][4] = {};
    const uint4 *x_lane = (const uint4 *)x + lane;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        u32 a[ROW_TILES][2][4];
        decode_pair<D>(a, words, pair, codes, wanted, lane, unit, copy);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            const uint4 b = x_lane[(pair * FRAGMENTS + f) * 32];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) multiply_tile(sum[r][f], a[r][0], b.x, b.y);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) multiply_tile(sum[r][f], a[r][1], b.z, b.w);
        }
    }
#endif
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
