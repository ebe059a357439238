// y = W' x' for packed matrices W' (M x K) that read the same x', lots of up to 128 tokens, on compute capability 9.0: four warps
// are a team, which multiplies what each has decoded of a row tile, from registers, by columns that one instruction (wgmma) reads
// from shared memory, while the next tiles are decoded. So a weight is decoded once for all columns of a lot.
//
// The row tiles of a segment (matrix) are in groups, of a tile for each warp of a block; the chunks of its inputs in runs. Items are
// a group and a run, the runs of a group in a row: a block has some of them, one after the other. A run is summed in floating
// point, in one order; the runs of a group as integers in fixed point, in memory, and who comes last writes y: in any cut the same
// bits. A run that is all of the inputs is written as it is.
//
// Nothing of the weights depends on the kernel before: bits and table are fetched before its end is waited for.
//
// Compile-time constants: THREADS, TABLE_BYTES, BATCH (columns of x': a multiple of 8), PIECE (tiles of a chunk whose x' a stage
// has), STAGES, AT_ONCE (tiles that are decoded while as many are multiplied), DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int FRAGMENTS = BATCH / 8;         // of eight columns
constexpr int PIECES = CHUNK / PIECE;
constexpr int STEPS = PIECE / AT_ONCE;
constexpr int CORE_BYTES = 128;              // of x': eight inputs of eight columns, 16 bytes a column
constexpr int TILE_BYTES = 2 * CORE_BYTES;   // of a fragment
constexpr int FRAGMENT_BYTES = 2 * TILE_BYTES;
constexpr int STAGE_BYTES = PIECE / 2 * FRAGMENTS * FRAGMENT_BYTES;  // a piece of x': [pair of tiles][fragment][core], see rotate.cu
constexpr int SUMS = 16 * BATCH;             // of a row tile: [fragment][of a lane][lane]
constexpr int CONTROL_BYTES = 128;
constexpr int RING = TABLE_BYTES + CONTROL_BYTES;
static_assert(WARPS % 4 == 0, "teams are whole");
static_assert(STEPS % 2 == 0, "a piece begins with the first of two buffers");

extern __shared__ __align__(128) u8 shared[];  // table, control, ring [STAGES][STAGE_BYTES]

struct Control {
    unsigned long long there[STAGES];  // barriers: completed when a piece of x' has come
    u32 left[STAGES];                  // how many warps have been done with it, ever
};
static_assert(sizeof(Control) <= CONTROL_BYTES, "the control of the ring has its room");

typedef float Sum[FRAGMENTS][4];  // of a lane

__device__ __forceinline__ u32 address_of(const void *place) { return (u32)__cvta_generic_to_shared(place); }

// The way of the block through pieces of x', each awaited and left by all warps: so none of them is more than a phase of a barrier
// behind, which is as far as waiting by parity tells phases apart.
struct Ring {
    const u8 *x;            // of the lot
    int pieces;             // of all chunks
    int ahead, left;        // the last that a stage has room for, and how many are left with the present one
    int stage = 0;          // where it is,
    u32 phase = 0;          // and of its barrier
    bool follows = false;   // whether it does another one

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

    // Asks for a piece, where `wanted`.
    __device__ __forceinline__ void fetch(int piece, int to_stage, u32 wanted) const {
        const u32 there = address_of(&control().there[to_stage]), to = address_of(shared + RING + to_stage * STAGE_BYTES);
        asm volatile("{.reg .pred p; setp.ne.u32 p, %4, 0;\n@p mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n"
            "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%2], [%3], %1, [%0];}"
            :: "r"(there), "r"(STAGE_BYTES), "r"(to), "l"(x + (size_t)piece * STAGE_BYTES), "r"(wanted) : "memory");
    }

    // Until the present piece is there. All lanes ask one barrier at once, and so leave the loop together: the compiler must know
    // it, or has no uniform registers behind it, and a look-up takes an instruction more.
    __device__ __forceinline__ void wait() const {
        const u32 there = address_of(&control().there[stage]);
        asm volatile("{.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra.uni AGAIN;}"
            :: "r"(there), "r"(phase) : "memory");
    }

    __device__ __forceinline__ void advance() {
        if (++ahead == pieces) ahead = 0;
        if (++stage == STAGES) stage = 0, phase ^= 1;
        left--, follows = true;
    }

    // The piece before the present one, when products have read it. The last warp to do so asks for what takes its place: nothing
    // else reads x', and a fence would wait for the next chunk's bits as well. No branches: products are on their way.
    __device__ __forceinline__ void leave_last(u32 lane) const {
        const int place = (stage == 0 ? STAGES : stage) - 1;
        u32 before = 0, leaves = lane == 0 && follows;
        asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0;\n@p atom.relaxed.cta.shared.add.u32 %0, [%1], 1;}"
            : "+r"(before) : "r"(address_of(&control().left[place])), "r"(leaves) : "memory");
        fetch(ahead, place, leaves && before % WARPS == WARPS - 1 && left >= STAGES);
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

// The bits that a warp decodes, and where those of the next two chunks are, in case they are wanted.
template <class D>
struct Bits {
    u32 words[D::WORDS];
    const u8 *next, *after;
    u32 next_wanted, after_wanted;
};

// Tiles from `first` on, of the next chunk where this one has no more. A part of the packed bits is replaced by the next chunk's
// after its last tile.
template <class D>
__device__ __forceinline__ void decode_tiles(u32 (&a)[AT_ONCE][4], Bits<D> &bits, int first, u32 lane, u32 unit, u32 copy) {
    const u8 *next = first < CHUNK ? bits.next : bits.after;
    const u32 wanted = first < CHUNK ? bits.next_wanted : bits.after_wanted;
#pragma unroll
    for (int t = 0; t < AT_ONCE; t++) {
        const int tile = (first + t) % CHUNK;
        D::decode(a[t], bits.words, tile, lane, unit, shared, copy);
#pragma unroll
        for (int part = 0; part < D::PARTS; part++)
            if (D::last_tile(part) == tile) D::load_part(bits.words, part, next, lane, wanted);
    }
}

// The tiles of the present piece of x', from `first` on, times it; to a sum that begins here where not `adds`. The first ones are
// decoded already, and so are those of the next piece then: while the last products of this one go on.
template <class D>
__device__ __forceinline__ void multiply_piece(Sum &sum, bool adds, u32 (&a)[2][AT_ONCE][4], Bits<D> &bits, int first, Ring &ring, u32 lane, u32 unit, u32 copy) {
    ring.wait();
    const unsigned long long columns = columns_at(ring.values());
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++) {
            const int tile = step * AT_ONCE + t;
            const int place = tile / 2 * FRAGMENTS * FRAGMENT_BYTES + tile % 2 * TILE_BYTES;
            multiply_tile_of_team(sum, a[step % 2][t], columns + place / 16, tile > 0 || adds);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        release(a[1 - step % 2]);
        if (step == 0) ring.leave_last(lane);
        decode_tiles<D>(a[1 - step % 2], bits, first + (step + 1) * AT_ONCE, lane, unit, copy);
    }
    ring.advance();
}

// Until all products are in the sum.
__device__ __forceinline__ void finish(Sum &sum, u32 (&a)[2][AT_ONCE][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(a[1]);
#pragma unroll
    for (int i = 0; i < 4 * FRAGMENTS; i++) asm volatile("" : "+f"(sum[i / 4][i % 4]) :: "memory");
}

// Adds a warp's sum of one of all `runs` to those of others in memory; whether it is the last to do so, and has all then.
__device__ __forceinline__ bool add_to_others(Sum &sum, const Problem &problem, size_t tile, int runs, u32 lane) {
    int *sums = problem.sums + tile * SUMS + lane;
#pragma unroll
    for (int i = 0; i < 4 * FRAGMENTS; i++)
        asm volatile("red.global.add.s32 [%0], %1;" :: "l"(sums + i * 32), "r"(__float2int_rn(sum[i / 4][i % 4] * problem.fixed_point)) : "memory");
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(problem.counts + tile, 1);
    if (__shfl_sync(~0u, before, 0) + 1 < runs) return false;
    __threadfence();
    const float unit = 1 / problem.fixed_point;  // a power of two
#pragma unroll
    for (int i = 0; i < 4 * FRAGMENTS; i++) sum[i / 4][i % 4] = __ldcg(sums + i * 32) * unit;
    return true;
}

__device__ __forceinline__ u32 both_as(float low, float high, int type) {
    return type == 1 ? to_bfloat16(low) | (u32)to_bfloat16(high) << 16 : to_half(low) | (u32)to_half(high) << 16;
}

// An 8 x 8 matrix, of which a lane has two neighbours of a row: those of a column.
__device__ __forceinline__ u32 transposed(u32 both) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(both));
    return result;
}

// In 16 bits a lane writes four rows of a column at once, where y lets it: eight columns' 16 rows are a store of a warp. One by
// one they are four, each of halves of the memory's sectors.
__device__ __forceinline__ void write(const Problem &problem, const Segment &segment, const Sum &sum, int tile, u32 lane) {
    const int row = tile * 16 + lane / 4, first = blockIdx.y * BATCH + lane % 4 * 2;
    const int row_of_four = tile * 16 + lane % 2 * 8 + lane % 4 / 2 * 4, column_of_four = blockIdx.y * BATCH + lane / 4;
    const bool in_fours = problem.out_type < 2 && ((problem.y_stride | segment.out_offset | segment.rows) & 3 | (int)((size_t)problem.y & 7)) == 0;
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
        factors[half] = row + 8 * half < segment.rows ? half_to_float(segment.scales[row + 8 * half]) : 0;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        const float2 x_scales = *(const float2 *)(problem.x_scales + first + 8 * f);
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) values[i] = sum[f][i] * (i % 2 ? x_scales.y : x_scales.x) * factors[i / 2];
        if (in_fours) {
            const u32 above = transposed(both_as(values[0], values[1], problem.out_type)), below = transposed(both_as(values[2], values[3], problem.out_type));
            const u32 others = __shfl_xor_sync(~0u, lane % 2 ? above : below, 1);
            const int column = column_of_four + 8 * f;
            if (column < problem.batch && row_of_four < segment.rows)
                *(uint2 *)((u16 *)problem.y + (size_t)column * problem.y_stride + segment.out_offset + row_of_four) = lane % 2 ? make_uint2(others, below) : make_uint2(above, others);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = first + 8 * f + i % 2, r = row + i / 2 * 8;
                if (r < segment.rows && column < problem.batch)
                    store(problem.y, (size_t)column * problem.y_stride + segment.out_offset + r, problem.out_type, values[i]);
            }
        }
    }
}

template <class D>
__device__ __forceinline__ void multiply_segment(const Problem &problem, const Segment &segment) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const int chunks = problem.chunks, run = problem.run, runs = (chunks + run - 1) / run, groups = (segment.row_tiles + WARPS - 1) / WARPS;
    const int begin = (blockIdx.x - segment.first_block) * segment.rows_per_block, end = min(begin + segment.rows_per_block, groups * runs);
    int tile = begin / runs * WARPS + warp, chunk = begin % runs * run;
    int left = (end / runs - begin / runs) * chunks + end % runs * run - chunk;
    // A warp without a row tile decodes the last one again, for its team.
    auto codes_of = [&](int tile, int chunk) {
        return segment.codes + ((size_t)min(tile, segment.row_tiles - 1) * chunks + chunk) * D::CHUNK_BYTES;
    };
    const u32 unit = segment.hash_unit;
    // A shuffle to itself: what the compiler knows the remainder to be, it takes again at every look-up.
    const u32 copy = __shfl_sync(~0u, lane % D::COPIES * 4, lane);
    Ring ring = {problem.x + (size_t)blockIdx.y * chunks * PIECES * STAGE_BYTES, chunks * PIECES, (chunk * PIECES + STAGES - 1) % (chunks * PIECES), left * PIECES};

    Bits<D> bits;
    D::load(bits.words, codes_of(tile, chunk), lane);
    if (threadIdx.x == 0) ring.prepare();
    D::fill(shared, segment.entries);
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (threadIdx.x == 0)
        for (int i = 0; i < min(STAGES, ring.left); i++) ring.fetch((chunk * PIECES + i) % ring.pieces, i, 1);
    __syncthreads();  // the barriers and the table are there
    Sum sum;
    u32 a[2][AT_ONCE][4];
    int next_tile = chunk + 1 == chunks ? tile + WARPS : tile, next_chunk = chunk + 1 == chunks ? 0 : chunk + 1;
    bits.after = codes_of(next_tile, next_chunk), bits.after_wanted = left > 1;
    decode_tiles<D>(a[0], bits, CHUNK, lane, unit, copy);
    while (left > 0) {
        const int of_run = min(run, chunks - chunk);
        for (int i = 0; i < of_run; i++, left--) {
            next_tile = next_chunk + 1 == chunks ? next_tile + WARPS : next_tile, next_chunk = next_chunk + 1 == chunks ? 0 : next_chunk + 1;
            bits.next = bits.after, bits.next_wanted = left > 1;
            bits.after = codes_of(next_tile, next_chunk), bits.after_wanted = left > 2;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                multiply_piece<D>(sum, piece || i, a, bits, piece * PIECE, ring, lane, unit, copy);
        }
        finish(sum, a);
        const size_t place = (size_t)blockIdx.y * problem.sum_tiles + segment.first_tile + tile;
        if (tile < segment.row_tiles && (runs == 1 || add_to_others(sum, problem, place, runs, lane)))
            write(problem, segment, sum, tile, lane);
        chunk += of_run;
        if (chunk == chunks) chunk = 0, tile += WARPS;
    }
}

struct Multiply {
    template <class D>
    static __device__ __forceinline__ void run(const Problem &problem, const Segment &segment) { multiply_segment<D>(problem, segment); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply_by_teams(const __grid_constant__ Problem problem) { run_segment<Multiply>(problem); }
