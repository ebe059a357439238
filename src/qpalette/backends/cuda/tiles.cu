// y = W' x' for packed matrices W' (M x K) that read the same x', 17 columns or more: as in multiply.cuh, with x' and sums of up
// to 32 columns. A cluster of blocks has some row tiles of one segment (matrix), and each block its part of their chunks: x' is
// read by as many blocks as there are clusters, and what the blocks have summed, in integers, is added between them.
//
// Nothing of the weights depends on the kernel before: bits and table are fetched before its end is waited for.

constexpr int FRAGMENT_SUMS = 128;  // of a row tile: four of a lane, [half of rows][column % 2][column / 2][row]
constexpr int X_FRAGMENT = 512, X_PAIR = FRAGMENTS * X_FRAGMENT, X_CHUNK = CHUNK / 2 * X_PAIR;  // bytes of x': 16 of a lane
constexpr int MOST_BLOCKS = 8;  // of a cluster

__device__ __forceinline__ int blocks_of_cluster() {
    int count = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
#endif
    return count;
}

__device__ __forceinline__ int rank_in_cluster() {
    int rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// What all threads of the cluster have written to shared memory, all may read.
__device__ __forceinline__ void meet() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Four sums at an address of shared memory, of a block of the cluster; nothing where `rank` is none of its `blocks`. No branch:
// so that a lane asks for all that it adds before it waits.
__device__ __forceinline__ void load_sums(int (&sums)[4], u32 address, int rank, int blocks) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; .reg .u32 there; setp.lt.s32 p, %5, %6;\n@p mapa.shared::cluster.u32 there, %4, %5;\n"
        "@p ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [there];}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]) : "r"(address), "r"(rank), "r"(blocks) : "memory");
#else
    if (rank < blocks)
        asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
            : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3]) : "r"(address) : "memory");
#endif
}

// The block's part of what the cluster writes: a warp takes a fragment, a lane four rows of a column.
__device__ __forceinline__ void write_sums(const Problem &problem, const Segment &segment, const int *sums, int row, int rows,
                                           u32 warp, u32 lane) {
    const int rank = rank_in_cluster(), blocks = blocks_of_cluster();
    const float unit_of_sums = 1 / problem.fixed_point;  // a power of two
    const int half = lane / 16, column = lane / 2 % 4 * 2 + lane / 8 % 2;
    for (int unit = rank * WARPS + warp; unit < rows * FRAGMENTS; unit += blocks * WARPS) {
        const int token = blockIdx.y * BATCH + unit % FRAGMENTS * 8 + column;
        const int first = (row + unit / FRAGMENTS) * 16 + half * 8 + lane % 2 * 4;
        const u32 place = (u32)__cvta_generic_to_shared(sums + unit * FRAGMENT_SUMS) + lane * 16;
        int parts[MOST_BLOCKS][4] = {}, total[4] = {};
#pragma unroll
        for (int other = 0; other < MOST_BLOCKS; other++) load_sums(parts[other], place, other, blocks);
#pragma unroll
        for (int i = 0; i < 4 * MOST_BLOCKS; i++) total[i % 4] += parts[i / 4][i % 4];
        if (token >= problem.batch) continue;
        const float factor = unit_of_sums * problem.x_scales[token];
        const size_t to = (size_t)token * problem.y_stride + segment.out_offset + first;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (first + i < segment.rows) store(problem.y, to + i, problem.out_type, total[i] * factor * half_to_float(segment.scales[first + i]));
    }
}

// Adds a lane's four sums of a fragment to the block's: without conflicts.
__device__ __forceinline__ void add_fragment(int *sums, const float (&sum)[4], float fixed_point, u32 lane) {
    const u32 place = (u32)__cvta_generic_to_shared(sums + lane % 4 * 8 + lane / 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("red.shared.add.s32 [%0], %1;" :: "r"(place + i * 128), "r"(__float2int_rn(sum[i] * fixed_point)) : "memory");
}

// All items of a warp that has part CUT of every chunk.
template <class D, int CUT = 0>
__device__ __forceinline__ void multiply_items(u32 cut, int *sums, float fixed_point, u32 (&words)[D::WORDS], Walk<D> at,
                                               uint4 (&x)[FRAGMENTS][PAIRS], const u8 *x_lane, u32 lane, u32 unit) {
    if constexpr (CUT + 1 < CUTS)
        if (cut != CUT) return multiply_items<D, CUT + 1>(cut, sums, fixed_point, words, at, x, x_lane, lane, unit);
    int x_chunk = at.chunk;
    while (at.left) {
        if (at.chunk != x_chunk) load_x<X_PAIR, X_FRAGMENT>(x, x_lane + (size_t)(x_chunk = at.chunk) * X_CHUNK);
        Walk<D> next = at;
        next.advance();
        float sum[FRAGMENTS][4] = {};
        multiply_tiles<D, CUT>(sum, words, next, x, lane, unit);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) add_fragment(sums + at.tile * SUMS + f * FRAGMENT_SUMS, sum[f], fixed_point, lane);
        at = next;
    }
}

template <class D>
__device__ __forceinline__ void multiply_segment(const Problem &problem, const Segment &segment) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const u32 cut = warp % CUTS;
    const int blocks = blocks_of_cluster(), rank = rank_in_cluster();
    const int row = (blockIdx.x - segment.first_block) / blocks * segment.rows_per_block;
    const int rows = min(segment.rows_per_block, segment.row_tiles - row);
    const int first = problem.chunks * rank / blocks, chunks = problem.chunks * (rank + 1) / blocks - first;
    const Walk<D> at(segment.codes, problem.chunks, row, rows, first, chunks, warp / CUTS);
    const u8 *x_lane = problem.x + ((size_t)blockIdx.y * problem.chunks + first) * X_CHUNK + cut * PAIRS * X_PAIR + lane * 16;
    int *sums = (int *)(shared + TABLE_BYTES);

    u32 words[D::WORDS] = {};
#pragma unroll
    for (int part = 0; part < D::PARTS; part++) D::load_part(words, part, at.codes, lane, at.left && has_bits<D>(cut, part));
    D::fill(shared, segment.entries);
    for (int i = threadIdx.x; i < rows * SUMS / 4; i += THREADS) ((int4 *)sums)[i] = make_int4(0, 0, 0, 0);
    wait_for_previous_kernel();
    let_next_kernel_start();
    uint4 x[FRAGMENTS][PAIRS];
    if (at.left) load_x<X_PAIR, X_FRAGMENT>(x, x_lane + (size_t)at.chunk * X_CHUNK);
    __syncthreads();  // the table is there, and the zeros
    multiply_items<D>(cut, sums, problem.fixed_point, words, at, x, x_lane, lane, segment.hash_unit);
    meet();
    write_sums(problem, segment, sums, row, rows, warp, lane);
    if (blocks > 1) meet();  // nobody leaves whose sums another reads
}

struct Multiply {
    template <class D>
    static __device__ __forceinline__ void run(const Problem &problem, const Segment &segment) { multiply_segment<D>(problem, segment); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply_tiles(const __grid_constant__ Problem problem) { run_segment<Multiply>(problem); }
