// y = W' x' for packed matrices W' (M x K) that read the same x', lots of 1 to 32 tokens: decode in registers, multiply by mma,
// as in multiply.cuh. A block works on one segment (matrix), and one lot.
//
// Nothing of the weights depends on the kernel before: bits, table and scales are fetched before its end is waited for.

constexpr int X_PAIR = 64 * BATCH, X_FRAGMENT = 64 * COLUMNS, X_CHUNK = CHUNK / 2 * X_PAIR;  // bytes of x', which has a column beside the other

// Whether what comes from the kernel before is loaded ahead: the first chunk of x' before the table is waited for, and what a
// thread multiplies its first sum by before the loop. us of a Llama-3.1-8B layer, without and with it (gemv.py): tcq2-4 52.1
// and 51.6 at batch 1, 65.8 and 63.1 at 16; but vq-3 38.2 and 40.9 at 1, and tcq-3.25 85.7 and 88.3 at 16, where no
// registers are left for it.
template <class D>
constexpr bool LOADS_AHEAD = D::HASHED && (D::VALUES == 2 || FRAGMENTS == 1);

// Whether the scale of a thread's first sum is loaded before the loop, and has a register in it.
template <class D>
constexpr bool HOLDS_SCALE = LOADS_AHEAD<D> || FRAGMENTS <= 2;

// All items of a warp that has part CUT of every chunk.
template <class D, int CUT = 0>
__device__ __forceinline__ void multiply_items(u32 cut, int *sums, float fixed_point, u32 (&words)[D::WORDS], Walk<D> at,
                                               uint4 (&x)[FRAGMENTS][PAIRS], int x_chunk, const u8 *x_lane, u32 lane, u32 unit) {
    if constexpr (CUT + 1 < CUTS)
        if (cut != CUT) return multiply_items<D, CUT + 1>(cut, sums, fixed_point, words, at, x, x_chunk, x_lane, lane, unit);
    while (at.left) {
        if (at.chunk != x_chunk) load_x<X_PAIR, X_FRAGMENT>(x, x_lane + (size_t)(x_chunk = at.chunk) * X_CHUNK);
        Walk<D> next = at;
        next.advance();
        multiply_item<D, CUT>(sums + at.tile * SUMS, fixed_point, words, next, x, lane, unit);
        at = next;
    }
}

template <class D>
__device__ void multiply_segment(const Problem &problem, const Segment &segment) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const u32 cut = warp % CUTS, lot = blockIdx.y * BATCH;
    const int row = (blockIdx.x - segment.first_block) * segment.rows_per_block;
    const int rows = min(segment.rows_per_block, segment.row_tiles - row);
    const Walk<D> at(segment.codes, problem.chunks, warp / CUTS, row, rows);
    int *sums = (int *)(shared + TABLE_BYTES);
    const u8 *x_lane = problem.x + (size_t)blockIdx.y * problem.chunks * X_CHUNK + cut * PAIRS * X_PAIR
        + (lane / 4 % COLUMNS * 4 + lane % 4) * 16;  // absent columns repeat one that is there
    const u32 unit = segment.hash_unit;

    u32 words[D::WORDS];
    if constexpr (CUTS == 1) {
        if (at.left) D::load(words, at.codes, lane);
    } else {
#pragma unroll
        for (int part = 0; part < D::PARTS; part++) D::load_part(words, part, at.codes, lane, at.left && has_bits<D>(cut, part));
    }
    D::fill(shared, segment.entries);
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) sums[i] = 0;
    const int first_row = (row + threadIdx.x / SUMS) * 16 + row_of(threadIdx.x % SUMS);  // that this thread writes
    u16 first_scale = 0;     // of the thread's first sum,
    float first_factor = 0;  // or, loaded ahead, times that of its column
    if constexpr (LOADS_AHEAD<D>) first_factor = first_row < segment.rows ? half_to_float(segment.scales[first_row]) : 0;
    else if constexpr (HOLDS_SCALE<D>) first_scale = first_row < segment.rows ? segment.scales[first_row] : 0;
    wait_for_previous_kernel();
    let_next_kernel_start();
    uint4 x[FRAGMENTS][PAIRS];
    constexpr bool loads_x = LOADS_AHEAD<D> || CUTS > 1;  // of two cuts: else tcq-4.5 spills 132 bytes (sm_89), and not with it
    int x_chunk = loads_x ? at.chunk : -1;
    if constexpr (loads_x)
        if (at.left) load_x<X_PAIR, X_FRAGMENT>(x, x_lane + (size_t)x_chunk * X_CHUNK);
    if constexpr (LOADS_AHEAD<D>) first_factor *= problem.x_scales[lot + column_of(threadIdx.x % SUMS)];
    __syncthreads();  // the table is there, and the zeros
    multiply_items<D>(cut, sums, problem.fixed_point, words, at, x, x_chunk, x_lane, lane, unit);
    __syncthreads();
    const float unit_of_sums = 1 / problem.fixed_point;  // a power of two
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) {
        const int r = (row + i / SUMS) * 16 + row_of(i % SUMS), column = lot + column_of(i % SUMS);
        if (r >= segment.rows || column >= problem.batch) continue;
        float factor;
        if constexpr (LOADS_AHEAD<D>)
            factor = i < THREADS ? first_factor : half_to_float(segment.scales[r]) * problem.x_scales[column];
        else
            factor = half_to_float(HOLDS_SCALE<D> && i < THREADS ? first_scale : segment.scales[r]);
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
