// y = W' x' for packed matrices W' (M x K) that read the same x', lots of up to 64 tokens, on compute capability 9.0: four warps
// are a team, which multiplies what each has decoded of a row tile, from registers, by columns that one instruction (wgmma) reads
// from shared memory, while the next tiles are decoded. So a weight is decoded once for all columns of a lot.
//
// The row tiles of a segment (matrix) are in groups, of a tile for each warp of a block; the chunks of its inputs in runs of RUN.
// Items are a group and a run, the runs of a group in a row: a block has some of them, one after the other. A run is summed in
// floating point, in one order; the runs of a group as integers in fixed point: in any cut the same bits. Those of a block stay
// in registers; where other blocks have runs of the group, too, they are added up in memory, and who comes last writes y.
//
// Nothing of the weights depends on the kernel before: bits and table are fetched before its end is waited for.
//
// Compile-time constants: THREADS, TABLE_BYTES, BATCH (columns of x': a multiple of 8), RUN, STAGES, DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int FRAGMENTS = BATCH / 8;         // of eight columns
constexpr int PAIRS = CHUNK / 2;             // of tiles
constexpr int AT_ONCE = 2;                   // tiles that are decoded while as many are multiplied
constexpr int CORE_BYTES = 128;              // of x': eight inputs of eight columns, 16 bytes a column
constexpr int TILE_BYTES = 2 * CORE_BYTES;   // of a fragment
constexpr int FRAGMENT_BYTES = 2 * TILE_BYTES;
constexpr int STAGE_BYTES = PAIRS * FRAGMENTS * FRAGMENT_BYTES;  // a chunk of x': [pair][fragment][core], see rotate.cu
constexpr int SUMS = 16 * BATCH;             // of a row tile: [fragment][of a lane][lane]
constexpr int CONTROL_BYTES = 128;
constexpr int RING = TABLE_BYTES + CONTROL_BYTES;
static_assert(WARPS % 4 == 0, "teams are whole");

extern __shared__ __align__(128) u8 shared[];  // table, control, ring [STAGES][STAGE_BYTES]

struct Control {
    unsigned long long there[STAGES];  // barriers: completed when a chunk of x' has come
    int left[STAGES];                  // how many warps are done with it
};
static_assert(sizeof(Control) <= CONTROL_BYTES, "the control of the ring has its room");

typedef float Sum[FRAGMENTS][4];  // of a lane
typedef int Total[FRAGMENTS][4];

__device__ __forceinline__ u32 address_of(const void *place) { return (u32)__cvta_generic_to_shared(place); }

// The way of the block through chunks of x', each awaited and left by all warps: so none of them is more than a phase of a barrier
// behind, which is as far as waiting by parity tells phases apart.
struct Ring {
    const u8 *x;  // of the lot
    int chunks;
    int stage = 0;  // where the present chunk is,
    u32 phase = 0;  // and of its barrier

    static __device__ __forceinline__ Control &control() { return *(Control *)(shared + TABLE_BYTES); }
    __device__ __forceinline__ u32 values() const { return address_of(shared + RING + stage * STAGE_BYTES); }

    // By one thread, ahead of a barrier of all.
    static __device__ __forceinline__ void prepare() {
        for (int i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(address_of(&control().there[i])) : "memory");
            control().left[i] = 0;
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // the copies see it
    }

    // Asks for a chunk, where `wanted`.
    __device__ __forceinline__ void fetch(int chunk, int to_stage, u32 wanted) const {
        const u32 there = address_of(&control().there[to_stage]), to = address_of(shared + RING + to_stage * STAGE_BYTES);
        asm volatile("{.reg .pred p; setp.ne.u32 p, %4, 0;\n@p mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n"
            "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%2], [%3], %1, [%0];}"
            :: "r"(there), "r"(STAGE_BYTES), "r"(to), "l"(x + (size_t)chunk * STAGE_BYTES), "r"(wanted) : "memory");
    }

    // Until the present chunk is there. All lanes ask one barrier at once, and so leave the loop together: the compiler must know
    // it, or has no uniform registers behind it, and a look-up takes an instruction more (575 instead of 509 for a chunk of tcq2-3.25).
    __device__ __forceinline__ void wait() const {
        const u32 there = address_of(&control().there[stage]);
        asm volatile("{.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra.uni AGAIN;}"
            :: "r"(there), "r"(phase) : "memory");
    }

    // From `chunk` on to the next one, of so many that are left with it. The last warp to do so asks for what takes its place.
    // Branches are a warp's, as in multiply.cuh.
    __device__ __forceinline__ void advance(int chunk, int left, u32 lane) {
        u32 before = 0, first = lane == 0, one = 1;
        asm volatile("" : "+r"(one));  // of a constant the compiler makes a choice of a lane
        __syncwarp();
        asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0;\n@p fence.acq_rel.cta;\n@p atom.shared.add.u32 %0, [%1], %3;}"
            : "+r"(before) : "r"(address_of(&control().left[stage])), "r"(first), "r"(one) : "memory");
        if (__shfl_sync(~0u, before, 0) == WARPS - 1) {
            control().left[stage] = 0;
            __threadfence_block();
            if (left > STAGES) fetch((chunk + STAGES) % chunks, stage, first);
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// What the instruction is told of columns at an address of shared memory: 16 inputs are two cores side by side, the next eight
// columns are a fragment further. In units of 16 bytes: address, of which a block of a cluster has more bits, distance of the
// cores, distance of the fragments.
__device__ __forceinline__ unsigned long long columns_at(u32 address) {
    return (unsigned long long)(address / 16 & 0x3fff) | (unsigned long long)(CORE_BYTES / 16) << 16 | (unsigned long long)(FRAGMENT_BYTES / 16) << 32;
}

// The registers that an instruction has read until now may be written again.
__device__ __forceinline__ void release(u32 (&a)[AT_ONCE][4]) {
#pragma unroll
    for (int i = 0; i < 4 * AT_ONCE; i++) asm volatile("" : "+r"(a[i / 4][i % 4]) :: "memory");
}

// Tiles from `first` on. A part of the packed bits is replaced by that at `next`, the next chunk's, after its last tile, where it is
// `wanted`.
template <class D>
__device__ __forceinline__ void decode_tiles(u32 (&a)[AT_ONCE][4], u32 (&words)[D::WORDS], int first, const u8 *next, u32 wanted, u32 lane, u32 unit, u32 copy) {
#pragma unroll
    for (int t = 0; t < AT_ONCE; t++) {
        D::decode(a[t], words, first + t, lane, unit, shared, copy);
#pragma unroll
        for (int part = 0; part < D::PARTS; part++)
            if (D::last_tile(part) == first + t) D::load_part(words, part, next, lane, wanted);
    }
}

// 16 tiles decoded, and multiplied by the chunk of x' at `x`; to a sum that begins here where not `adds`.
template <class D>
__device__ __forceinline__ void multiply_chunk(Sum &sum, bool adds, u32 (&words)[D::WORDS], const u8 *next, u32 wanted, u32 x, u32 lane, u32 unit, u32 copy) {
    asm volatile("" : "+l"(next), "+r"(wanted));  // computed here, once: the compiler would do it again for every part
    u32 a[2][AT_ONCE][4];
    const unsigned long long columns = columns_at(x);
    decode_tiles<D>(a[0], words, 0, next, wanted, lane, unit, copy);
#pragma unroll
    for (int step = 0; step < CHUNK / AT_ONCE; step++) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++) {
            const int tile = step * AT_ONCE + t;
            const int place = tile / 2 * FRAGMENTS * FRAGMENT_BYTES + tile % 2 * TILE_BYTES;
            multiply_tile_of_team(sum, a[step % 2][t], columns + place / 16, tile > 0 || adds);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (step + 1 == CHUNK / AT_ONCE) break;
        if (step > 0) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            release(a[1 - step % 2]);
        }
        decode_tiles<D>(a[1 - step % 2], words, (step + 1) * AT_ONCE, next, wanted, lane, unit, copy);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(a[0]), release(a[1]);
#pragma unroll
    for (int i = 0; i < 4 * FRAGMENTS; i++) asm volatile("" : "+f"(sum[i / 4][i % 4]) :: "memory");
}

// Adds a warp's totals, of `own` of all `runs`, to those of others in memory; whether it is the last to do so, and has all then.
__device__ __forceinline__ bool add_to_others(Total &total, int *sums, int *count, int own, int runs, u32 lane) {
#pragma unroll
    for (int i = 0; i < 4 * FRAGMENTS; i++)
        asm volatile("red.global.add.s32 [%0], %1;" :: "l"(sums + i * 32 + lane), "r"(total[i / 4][i % 4]) : "memory");
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(count, own);
    if (__shfl_sync(~0u, before, 0) + own < runs) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < 4 * FRAGMENTS; i++) total[i / 4][i % 4] = __ldcg(sums + i * 32 + lane);
    return true;
}

__device__ __forceinline__ void write(const Problem &problem, const Segment &segment, const Total &total, int tile, u32 lane) {
    const float unit_of_sums = 1 / problem.fixed_point;  // a power of two
    const int row = tile * 16 + lane / 4, first = blockIdx.y * BATCH + lane % 4 * 2;
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
        factors[half] = row + 8 * half < segment.rows ? half_to_float(segment.scales[row + 8 * half]) : 0;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        const float2 x_scales = *(const float2 *)(problem.x_scales + first + 8 * f);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = first + 8 * f + i % 2, r = row + i / 2 * 8;
            if (r >= segment.rows || column >= problem.batch) continue;
            const float value = total[f][i] * unit_of_sums * (i % 2 ? x_scales.y : x_scales.x) * factors[i / 2];
            store(problem.y, (size_t)column * problem.y_stride + segment.out_offset + r, problem.out_type, value);
        }
    }
}

template <class D>
__device__ __forceinline__ void multiply_segment(const Problem &problem, const Segment &segment) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const int chunks = problem.chunks, runs = (chunks + RUN - 1) / RUN, groups = (segment.row_tiles + WARPS - 1) / WARPS;
    const int begin = (blockIdx.x - segment.first_block) * segment.rows_per_block, end = min(begin + segment.rows_per_block, groups * runs);
    int tile = begin / runs * WARPS + warp, chunk = begin % runs * RUN, first = chunk;
    int left = (end / runs - begin / runs) * chunks + end % runs * RUN - chunk;
    // A warp without a row tile decodes the last one again, for its team.
    auto codes_of = [&](int tile, int chunk) {
        return segment.codes + ((size_t)min(tile, segment.row_tiles - 1) * chunks + chunk) * D::CHUNK_BYTES;
    };
    const u32 unit = segment.hash_unit;
    // A shuffle to itself: what the compiler knows the remainder to be, it takes again at every look-up (1444 instead of 1315
    // instructions an item of four row tiles, tcq2-3.25, 64 columns, 16 copies).
    const u32 copy = __shfl_sync(~0u, lane % D::COPIES * 4, lane);
    Ring ring = {problem.x + (size_t)blockIdx.y * chunks * STAGE_BYTES, chunks};

    u32 words[D::WORDS];
    D::load(words, codes_of(tile, chunk), lane);
    if (threadIdx.x == 0) ring.prepare();
    D::fill(shared, segment.entries);
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (threadIdx.x == 0)
        for (int i = 0; i < min(STAGES, left); i++) ring.fetch((chunk + i) % chunks, i, 1);
    __syncthreads();  // the barriers and the table are there
    Sum sum;
    Total total = {};
    for (; left > 0; left--) {
        const bool ends = chunk + 1 == chunks;
        const int next_tile = ends ? tile + WARPS : tile, next_chunk = ends ? 0 : chunk + 1;
        ring.wait();
        multiply_chunk<D>(sum, chunk % RUN, words, codes_of(next_tile, next_chunk), left > 1, ring.values(), lane, unit, copy);
        ring.advance(chunk, left, lane);
        if (next_chunk % RUN == 0) {
#pragma unroll
            for (int i = 0; i < 4 * FRAGMENTS; i++) total[i / 4][i % 4] += __float2int_rn(sum[i / 4][i % 4] * problem.fixed_point);
            if (ends || left == 1) {
                const int own = (chunk - first) / RUN + 1;
                const size_t place = (size_t)blockIdx.y * problem.sum_tiles + segment.first_tile + tile;
                if (tile < segment.row_tiles && (own == runs || add_to_others(total, problem.sums + place * SUMS, problem.counts + place, own, runs, lane)))
                    write(problem, segment, total, tile, lane);
#pragma unroll
                for (int i = 0; i < 4 * FRAGMENTS; i++) total[i / 4][i % 4] = 0;
                first = 0;
            }
        }
        tile = next_tile, chunk = next_chunk;
    }
}

struct Multiply {
    template <class D>
    static __device__ __forceinline__ void run(const Problem &problem, const Segment &segment) { multiply_segment<D>(problem, segment); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply_by_teams(const __grid_constant__ Problem problem) { run_segment<Multiply>(problem); }
