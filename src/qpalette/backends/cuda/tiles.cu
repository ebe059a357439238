// y = W' x' for packed matrices W' (M x K) that read the same x', many columns: decode in registers, multiply by mma, as in
// tiles.cuh. A cluster of blocks has some row tiles of one segment (matrix), and each block its part of their chunks: x' is
// read by as many blocks as there are clusters, and what the blocks have summed, in integers, is added between them.
//
// Nothing of the weights depends on the kernel before: bits and table are fetched before its end is waited for.

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
        const u32 place = address_of(sums + unit * FRAGMENT_SUMS) + lane * 16;
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

template <class D>
__device__ __forceinline__ void multiply_segment(const Problem &problem, const Segment &segment) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const int blocks = blocks_of_cluster(), rank = rank_in_cluster();
    const int row = (blockIdx.x - segment.first_block) / blocks * segment.rows_per_block;
    const int rows = min(segment.rows_per_block, segment.row_tiles - row);
    const int first = problem.chunks * rank / blocks, chunks = problem.chunks * (rank + 1) / blocks - first;
    Ring ring(problem.x + ((size_t)blockIdx.y * problem.chunks + first) * STAGE_BYTES, chunks);
    Items<D> at(segment.codes, problem.chunks, row, rows, first, chunks, warp);
    int *sums = (int *)(shared + SUMS_AT);
    const u32 unit = segment.hash_unit;
    // A shuffle to itself: what the compiler knows the remainder to be, it takes again at every look-up (1444 instead of 1315
    // instructions an item, tcq2-3.25, 64 columns, 16 copies).
    const u32 copy = __shfl_sync(~0u, lane % D::COPIES * 4, lane);

    u32 words[ROW_TILES][D::WORDS];
    if (at.left > 0) load_item<D>(words, at, lane);
    if (threadIdx.x == 0) ring.prepare();
    D::fill(shared, segment.entries);
    for (int i = threadIdx.x; i < at.groups * ROW_TILES * SUMS / 4; i += THREADS) ((int4 *)sums)[i] = make_int4(0, 0, 0, 0);
    wait_for_previous_kernel();
    let_next_kernel_start();
    __syncthreads();  // the barriers, the table, the zeros are there
    if (warp == 0) ring.begin(lane);
    while (ring.chunk < chunks) {
        ring.wait();
        while (at.left > 0 && at.chunk == ring.chunk) {
            Items<D> next = at;
            next.advance();
            multiply_item<D>(sums + at.group * ROW_TILES * SUMS, problem.fixed_point, words, next, ring.values(), lane, unit, copy);
            at = next;
        }
        ring.advance(lane);
    }
    meet();
    write_sums(problem, segment, sums, row, rows, warp, lane);
    if (blocks > 1) meet();  // nobody leaves whose sums another reads
}

struct Multiply {
    template <class D>
    static __device__ __forceinline__ void run(const Problem &problem, const Segment &segment) { multiply_segment<D>(problem, segment); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply_tiles(const __grid_constant__ Problem problem) { run_segment<Multiply>(problem); }
