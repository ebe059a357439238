// Attention over a cache of codes, which are read as they are: out = softmax(scale q k + mask) v for ROWS queries of a key
// head that share a mask.
//
// With y' what is stored of x = A^-1 y' + m, a score is (A^-T q).y' + q.m, and a sum of values A^-1 (sum p y') + (sum p) m:
// transforms are applied to queries and to sums, never to a token. Warps take steps of STEP tokens in turn. Codes become
// float16 by look-ups in shared memory, where every bank has a copy of the table, and both products are mma.m16n8k16:
// queries times keys, then values times softmax weights, which a lane has where the second operand wants them. A lane has a
// quarter of a key and an eighth of a value, which is contiguous in every plane of the codes: the order of numbers within
// a product does not matter, as long as queries have the same.
// Scales touch no number: that of a key multiplies its score, that of a value is added to the exponent of its weight.
// Tokens that are kept exact come apart, in float32. Warps are added up in a fixed order, and what a block has of codes is
// multiplied by its transform; the block of a head that ends last adds the splits of the tokens, in their order.
//
// coded_attend.cuh has what a warp does with its steps; here are exact tokens, and how parts are added.
//
// A token's attention to a short context is a chain of waits. Tables, matrices and means are of the model: they are loaded,
// or asked for, before the kernel ahead has ended, and what is waited for is loaded together.
//
// Compile-time constants: KEY_ and VALUE_ DIM, WIDTH, BITS; SAME (both have one table), ROWS (1 to 8), TYPE (0 float16,
// 1 bfloat16), WARPS, STEP (tokens that a warp attends to at a time, 16 or 32).

// --- exact tokens -----------------------------------------------------------------------------------------------------

// What a thread has of exact tokens: numbers threadIdx.x + e * THREADS of [ROWS][VALUE_DIM].
struct ExactPart {
    static constexpr int EACH = (ROWS * VALUE_DIM + THREADS - 1) / THREADS;
    float highest[ROWS], sum[ROWS], out[EACH];
};

// Every gridDim.x-th exact token from blockIdx.x on, by the whole block.
__device__ __forceinline__ void attend_exact(const Problem &problem, const Where &where, const float *query, float *scores, ExactPart &part) {
    const int all = problem.sink_count + problem.window, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto &[highest, sum, out] = part;
#pragma unroll
    for (int row = 0; row < ROWS; row++) highest[row] = LOWEST, sum[row] = 0;
#pragma unroll
    for (int e = 0; e < ExactPart::EACH; e++) out[e] = 0;
    const size_t sinks = (size_t)where.item * problem.sink_count, ring = (size_t)where.item * problem.window;
    for (int first = blockIdx.x; first < all; first += EXACT * gridDim.x) {
        const int here = min(EXACT, (all - first + (int)gridDim.x - 1) / (int)gridDim.x);
        __syncthreads();
        for (int i = warp; i < here; i += WARPS) {
            const int exact = first + i * gridDim.x;
            const bool is_sink = exact < problem.sink_count;
            const long long token = is_sink ? where.start + exact : problem.keys.ring_tokens[exact - problem.sink_count];
            const bool is_there = token >= 0 && token < where.tokens && in_ring(problem, where, token) != is_sink;
            const bool counts = is_there && where.mask[token];
            const u16 *key = is_sink ? problem.keys.sinks + (sinks + exact) * KEY_DIM : problem.keys.ring + (ring + exact - problem.sink_count) * KEY_DIM;
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                float product = 0;
                for (int d = lane; d < KEY_DIM; d += 32) product += query[row * KEY_DIM + d] * load(key, d, TYPE);
#pragma unroll
                for (int step = 16; step; step /= 2) product += __shfl_xor_sync(~0u, product, step);
                if (lane == 0) scores[row * EXACT + i] = counts ? product * problem.scale : -__int_as_float(0x7f800000);
            }
        }
        __syncthreads();
        float shrink[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float top = highest[row];
            for (int i = 0; i < here; i++) top = fmaxf(top, scores[row * EXACT + i]);
            shrink[row] = exp2_of(highest[row] - top), highest[row] = top, sum[row] *= shrink[row];
            for (int i = 0; i < here; i++) sum[row] += exp2_of(scores[row * EXACT + i] - top);
        }
#pragma unroll
        for (int e = 0; e < ExactPart::EACH; e++) {
            const int at = threadIdx.x + e * THREADS, row = at / VALUE_DIM, d = at % VALUE_DIM;
            float top = LOWEST, smaller = 1;
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (r == row) top = highest[r], smaller = shrink[r];
            out[e] *= smaller;
            if (row < ROWS)
                for (int i = 0; i < here; i++) {
                    const int exact = first + i * gridDim.x;
                    const u16 *value = exact < problem.sink_count ? problem.values.sinks + (sinks + exact) * VALUE_DIM
                                                                  : problem.values.ring + (ring + exact - problem.sink_count) * VALUE_DIM;
                    const float weight = exp2_of(scores[row * EXACT + i] - top);
                    if (weight != 0) out[e] += weight * load(value, d, TYPE);
                }
        }
    }
}

// --- the kernel -------------------------------------------------------------------------------------------------------

// Of the block's warps: what they have of `coded`, in the order of numbers, highest scores and sums of weights.
__device__ __forceinline__ void add_warps(const Part *parts, float *coded, float *highest, float *sum) {
    for (int at = threadIdx.x; at < ROWS * WIDE; at += THREADS) {
        const int row = at / WIDE, i = at % WIDE, number = i % 8 * (WIDE / 8) + i / 8;
        float top = LOWEST, total = 0, value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, parts[w].highest[row]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float shrink = exp2_of(parts[w].highest[row] - top);
            total += shrink * parts[w].sum[row], value += shrink * parts[w].out[row][i];
        }
        if (number < VALUE_DIM) coded[row * VALUE_DIM + number] = value;
        if (i == 0) highest[row] = top, sum[row] = total;
    }
    __syncthreads();
}

// A part of a split: coded tokens, turned back and moved by the mean, and exact ones.
__device__ __forceinline__ void store_part(const float *coded, const float *highest, const float *sum, const float *mean, const ExactPart &exact, float *part) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        const float top = fmaxf(highest[row], exact.highest[row]), shrink = exp2_of(highest[row] - top), exact_shrink = exp2_of(exact.highest[row] - top);
        if (threadIdx.x == 0) part[row] = top, part[8 + row] = shrink * sum[row] + exact_shrink * exact.sum[row];
#pragma unroll
        for (int e = 0; e < ExactPart::EACH; e++)
            if (const int at = threadIdx.x + e * THREADS; at < ROWS * VALUE_DIM && at / VALUE_DIM == row)
                part[16 + at] = shrink * (coded[at] + sum[row] * mean[at % VALUE_DIM]) + exact_shrink * exact.out[e];
    }
}

// The parts of all splits become a result. `weights` is [splits][16].
__device__ __forceinline__ void add_splits(const Problem &problem, const Where &where, const float *parts, float *weights) {
    constexpr int TOGETHER = 16;
    const int splits = gridDim.x, lane = threadIdx.x % 32;
    for (int at = threadIdx.x; at < splits * 16; at += THREADS) weights[at] = __ldcg(parts + at / 16 * PART + at % 16);
    __syncthreads();
    for (int row = threadIdx.x / 32; row < ROWS; row += WARPS) {
        float highest = LOWEST, total = 0;
        for (int s = lane; s < splits; s += 32) highest = fmaxf(highest, weights[s * 16 + row]);
#pragma unroll
        for (int step = 16; step; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
        for (int s = lane; s < splits; s += 32) total += exp2_of(weights[s * 16 + row] - highest) * weights[s * 16 + 8 + row];
#pragma unroll
        for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
        for (int s = lane; s < splits; s += 32) weights[s * 16 + row] = total == 0 ? 0 : exp2_of(weights[s * 16 + row] - highest) / total;
    }
    __syncthreads();
    for (int at = threadIdx.x * 2; at < ROWS * VALUE_DIM; at += THREADS * 2) {
        const int row = at / VALUE_DIM;
        float2 value = {0, 0};
        for (int first = 0; first < splits; first += TOGETHER) {
            float2 own[TOGETHER];
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) own[k] = first + k < splits ? __ldcg((const float2 *)(parts + (first + k) * PART + 16 + at)) : float2{0, 0};
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const float weight = first + k < splits ? weights[(first + k) * 16 + row] : 0;
                value.x += weight * own[k].x, value.y += weight * own[k].y;
            }
        }
        const size_t out = ((size_t)where.item * problem.rows + where.row) * VALUE_DIM + at;
        if (where.row + row < problem.rows) store(problem.out, out, TYPE, value.x), store(problem.out, out + 1, TYPE, value.y);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) cache_attend(const __grid_constant__ Problem problem) {
    extern __shared__ __align__(16) u8 memory[];  // tables and sums of a transform; then parts of the warps; then of the splits
    __shared__ __align__(16) float query[ROWS * KEY_DIM], turned[ROWS * KEY_DIM], coded[ROWS * VALUE_DIM];
    __shared__ float factors[ROWS], offsets[ROWS], scores[ROWS * EXACT], means[KEY_DIM], highest[ROWS], sum[ROWS];
    __shared__ __align__(16) Scales scales[WARPS][2];
    __shared__ bool is_last;
    const int blocks = (problem.rows + ROWS - 1) / ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Where where;
    where.head = blockIdx.y / blocks, where.row = blockIdx.y % blocks * ROWS, where.batch = blockIdx.z;
    where.item = where.batch * problem.heads + where.head;
    where.keys = problem.keys.pages + (size_t)where.item * problem.keys.page_count * Keys::PAGE_BYTES;
    where.values = problem.values.pages + (size_t)where.item * problem.values.page_count * Values::PAGE_BYTES;
    const float *matrix = problem.keys.matrix + (problem.keys.is_shared ? 0 : (size_t)where.head * KEY_DIM * KEY_DIM);
    const float *mean = problem.keys.mean + (problem.keys.is_shared ? 0 : where.head * KEY_DIM);
    const float *inverse = problem.values.matrix + (problem.values.is_shared ? 0 : (size_t)where.head * VALUE_DIM * VALUE_DIM);
    const float *value_mean = problem.values.mean + (problem.values.is_shared ? 0 : where.head * VALUE_DIM);
    // Before the wait, what is of the model.
    Transform<KEY_DIM, THREADS, ROWS> transform;
    transform.load(matrix, 0);
    constexpr int KEY_BYTES = Looks<Keys>::TABLE_BYTES, VALUE_BYTES = Looks<Values>::TABLE_BYTES;
    constexpr int TABLES = KEY_BYTES > VALUE_BYTES ? KEY_BYTES : VALUE_BYTES;
    spread_table<Keys, THREADS>(problem.keys.table, memory, 0);
    if (!SAME) spread_table<Values, THREADS>(problem.values.table, memory, 1);
    for (int d = threadIdx.x; d < KEY_DIM; d += THREADS) means[d] = mean[d];
    fetch_all(inverse, VALUE_DIM * VALUE_DIM * 4), fetch_all(value_mean, VALUE_DIM * 4);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int at = threadIdx.x; at < ROWS * KEY_DIM; at += THREADS) {
        const int row = min(where.row + at / KEY_DIM, problem.rows - 1);
        query[at] = load(problem.query + where.batch * problem.query_batch + where.head * problem.query_head + row * problem.query_row, at % KEY_DIM, TYPE);
    }
    fetch_all(problem.keys.sinks + (size_t)where.item * problem.sink_count * KEY_DIM, problem.sink_count * KEY_DIM * 2);
    fetch_all(problem.values.sinks + (size_t)where.item * problem.sink_count * VALUE_DIM, problem.sink_count * VALUE_DIM * 2);
    where.tokens = min((long long)problem.length, problem.count[0]), where.start = problem.starts[where.batch];
    where.mask = problem.mask + where.batch * problem.mask_batch;
    const Source source(where, first_step());
    Codes codes;
    if (first_step() < where.tokens) codes.load_keys(source, where, first_step());
    __syncthreads();
    transform.apply(matrix, query, (float *)(memory + TABLES), turned);
    for (int row = warp; row < ROWS; row += WARPS) {
        float largest = 0, product = 0;
        for (int d = lane; d < KEY_DIM; d += 32) largest = fmaxf(largest, fabsf(turned[row * KEY_DIM + d])), product += query[row * KEY_DIM + d] * means[d];
#pragma unroll
        for (int step = 16; step; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step)), product += __shfl_xor_sync(~0u, product, step);
        // By a power of two, so that float16 cannot overflow.
        const float unit = largest > 0 && isfinite(largest) ? exp2f(floorf(log2f(largest))) : 1;
        if (lane == 0) factors[row] = unit * problem.scale, offsets[row] = product * problem.scale;
        for (int d = lane; d < KEY_DIM; d += 32) turned[row * KEY_DIM + d] /= unit;
    }
    __syncthreads();
    Part *parts = (Part *)memory;
    attend_codes(problem, where, source, codes, turned, factors, offsets, memory, scales[warp], parts[warp]);
    Transform<VALUE_DIM, THREADS, ROWS> back;
    back.load(inverse, 0);
    __syncthreads();
    add_warps(parts, coded, highest, sum);
    back.apply(inverse, coded, (float *)memory, coded);
    ExactPart exact;
    attend_exact(problem, where, query, scores, exact);
    const int place = blockIdx.z * gridDim.y + blockIdx.y;
    float *all = problem.parts + (size_t)place * gridDim.x * PART;
    store_part(coded, highest, sum, value_mean, exact, all + blockIdx.x * PART);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(problem.arrived + place, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    add_splits(problem, where, all, (float *)memory);
    if (threadIdx.x == 0) problem.arrived[place] = 0;
}
