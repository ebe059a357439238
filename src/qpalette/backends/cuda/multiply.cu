// y = W' x' for packed matrices W' (M x K) that read the same x', batch 1 to 16: decode in registers, multiply by mma, as in
// multiply.cuh. A block works on one segment (matrix).
//
// Nothing of the weights depends on the kernel before: bits, table and scales are fetched before its end is waited for.

constexpr int X_PAIR = 64 * BATCH, X_FRAGMENT = 64 * COLUMNS, X_CHUNK = PAIRS * X_PAIR;  // bytes of x', which has a column beside the other

// Whether what comes from the kernel before is loaded ahead: the first chunk of x' before the table is waited for, and what a
// thread multiplies its first sum by before the loop. us of a Llama-3.1-8B layer, without and with it (gemv.py): tcq2-4 52.1
// and 51.6 at batch 1, 65.8 and 63.1 at 16; but vq-3 38.2 and 40.9 at 1, and tcq-3.25 85.7 and 88.3 at 16, where no
// registers are left for it.
template <class D>
constexpr bool LOADS_AHEAD = D::HASHED && (D::VALUES == 2 || FRAGMENTS == 1);

template <class D>
__device__ void multiply_segment(const Problem &problem, const Segment &segment) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const int row = (blockIdx.x - segment.first_block) * segment.rows_per_block;
    const int rows = min(segment.rows_per_block, segment.row_tiles - row);
    Walk<D> at(segment.codes, problem.chunks, warp, row, rows);
    int *sums = (int *)(shared + TABLE_BYTES);
    const u8 *x_lane = problem.x + (lane / 4 % COLUMNS * 4 + lane % 4) * 16;  // absent columns repeat one that is there
    const u32 unit = segment.hash_unit;

    u32 words[D::WORDS];
    if (at.left) D::load(words, at.codes, lane);
    D::fill(shared, segment.entries);
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) sums[i] = 0;
    const int first_row = row * 16 + threadIdx.x / SUMS * 16 + threadIdx.x % 16;  // that this thread writes
    u16 first_scale = 0;     // of the thread's first sum,
    float first_factor = 0;  // or, loaded ahead, times that of its column
    if constexpr (LOADS_AHEAD<D>) first_factor = first_row < segment.rows ? half_to_float(segment.scales[first_row]) : 0;
    else first_scale = first_row < segment.rows ? segment.scales[first_row] : 0;
    wait_for_previous_kernel();
    let_next_kernel_start();
    uint4 x[FRAGMENTS][PAIRS];
    int x_chunk = LOADS_AHEAD<D> ? at.chunk : -1;
    if constexpr (LOADS_AHEAD<D>) {
        if (at.left) load_x<X_PAIR, X_FRAGMENT>(x, x_lane + (size_t)x_chunk * X_CHUNK);
        first_factor *= problem.x_scales[threadIdx.x % SUMS / 16];
    }
    __syncthreads();  // the table is there, and the zeros
    while (at.left) {
        if (at.chunk != x_chunk) load_x<X_PAIR, X_FRAGMENT>(x, x_lane + (size_t)(x_chunk = at.chunk) * X_CHUNK);
        Walk<D> next = at;
        next.advance();
        multiply_item<D>(sums + at.tile * SUMS, problem.fixed_point, words, next, x, lane, unit);
        at = next;
    }
    __syncthreads();
    const float unit_of_sums = 1 / problem.fixed_point;  // a power of two
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) {
        const int r = (row + i / SUMS) * 16 + i % 16, column = i % SUMS / 16;
        if (r >= segment.rows || column >= problem.batch) continue;
        float factor;
        if constexpr (LOADS_AHEAD<D>)
            factor = i < THREADS ? first_factor : half_to_float(segment.scales[r]) * problem.x_scales[column];
        else
            factor = half_to_float(i < THREADS ? first_scale : segment.scales[r]);
        const size_t place = (size_t)column * problem.y_stride + segment.out_offset + r;
        if constexpr (LOADS_AHEAD<D>) store(problem.y, place, problem.out_type, sums[i] * unit_of_sums * factor);
        else store(problem.y, place, problem.out_type, sums[i] * unit_of_sums * problem.x_scales[column] * factor);
    }
}

struct Multiply {
    template <class D>
    static __device__ __forceinline__ void run(const Problem &problem, const Segment &segment) { multiply_segment<D>(problem, segment); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply(const __grid_constant__ Problem problem) { run_segment<Multiply>(problem); }
