// What stands around the products of a layer of experts: the plan of its runs, the gate between the products, the weighted sum.
//
// Compile-time constants: THREADS; of `gate` also FUNCTION (0 silu, 1 gelu, 2 gelu of tanh, 3 relu squared), GATED, INTERLEAVED.

// Sums of what the threads before have, of four values at once; `total` gets those of all. Of one block of THREADS.
struct Sums { int of[4]; };

__device__ Sums sums_before(Sums mine, Sums &total) {
    __shared__ Sums of_warps[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Sums until = mine;
    for (int distance = 1; distance < 32; distance *= 2)
        for (int i = 0; i < 4; i++) {
            const int other = __shfl_up_sync(~0u, until.of[i], distance);
            if (lane >= distance) until.of[i] += other;
        }
    if (lane == 31) of_warps[warp] = until;
    __syncthreads();
    total = {};
    for (int w = 0; w < THREADS / 32; w++)
        for (int i = 0; i < 4; i++) {
            if (w == warp) until.of[i] += total.of[i];
            total.of[i] += of_warps[w].of[i];
        }
    for (int i = 0; i < 4; i++) until.of[i] -= mine.of[i];
    return until;
}

constexpr int INDEX_PART = 2048;  // slots

// Experts of a part of the slots from `start` on into shared memory, -1 for those that are not there; how many. By all
// threads, who are done with the part before.
__device__ __forceinline__ int load_part(int *part, const long long *index, int start, int slots, int experts) {
    const int count = min(INDEX_PART, slots - start);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const long long expert = index[start + i];
        part[i] = expert < 0 || expert >= experts ? -1 : (int)expert;
    }
    __syncthreads();
    return count;
}

// index [slots] -> runs, in the order of experts, an expert's slots in their own: always the same for the same index. One
// block; a thread has an expert, and reads the whole index twice: the block's threads read the same word at once.
extern "C" __global__ void __launch_bounds__(THREADS)
plan_runs(const long long *index, int slots, int ranks, int experts, const int *costs, int *tokens, int *owners,
          int *positions, Run *runs, Plan *plan) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ int part[INDEX_PART];
    const int expert = threadIdx.x;
    int count = 0;
    for (int start = 0; start < slots; start += INDEX_PART) {
        const int there = load_part(part, index, start, slots, experts);
#pragma unroll 8
        for (int i = 0; i < there; i++) count += part[i] == expert;
    }
    const int cut = (count + RUN - 1) / RUN;
    const int cost[2] = {expert < experts ? costs[expert] : 0, expert < experts ? costs[experts + expert] : 0};
    Sums total;
    const Sums before = sums_before({count, cut, cut * cost[0], cut * cost[1]}, total);
    int position = before.of[0];
    for (int i = 0; i < cut; i++) {
        Run run = {expert, position + i * RUN, min(RUN, count - i * RUN), {}};
        for (int p = 0; p < 2; p++) run.begin[p] = before.of[2 + p] + i * cost[p];
        runs[before.of[1] + i] = run;
    }
    for (int start = 0; start < slots; start += INDEX_PART) {
        const int there = load_part(part, index, start, slots, experts);
#pragma unroll 8
        for (int i = 0; i < there; i++)
            if (part[i] == expert) {
                const int slot = start + i;
                tokens[position] = slot / ranks, owners[position] = expert;
                positions[slot] = position++;
            }
    }
    for (int slot = threadIdx.x; slot < slots; slot += THREADS)
        if (index[slot] < 0 || index[slot] >= experts) positions[slot] = -1;
    for (int rest = total.of[0] + threadIdx.x; rest < slots; rest += THREADS) tokens[rest] = owners[rest] = 0;  // of no slot
    if (threadIdx.x == 0) *plan = {{total.of[2], total.of[3]}, total.of[1], total.of[0]};
}

#ifdef FUNCTION

__device__ __forceinline__ float bent(float x) {
    if (FUNCTION == 0) return x / (1 + expf(-x));
    if (FUNCTION == 1) return x * normcdff(x);
    if (FUNCTION == 2) return .5f * x * (1 + tanhf(.7978845608f * (x + .044715f * x * x * x)));
    return x > 0 ? x * x : 0;
}

// first [positions][F], what experts computed first, with `bias` [experts][F] where there is one -> inner [positions][I].
extern "C" __global__ void __launch_bounds__(THREADS)
gate(const float *first, float *inner, const Plan *plan, const int *owners, const void *bias, int bias_type, int columns,
     float limit, float alpha, float offset) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int position = blockIdx.x, k = blockIdx.y * THREADS + threadIdx.x;
    if (position >= plan->positions || k >= columns) return;
    const int width = GATED ? 2 * columns : columns;
    const int at = INTERLEAVED ? 2 * k : k, beside = INTERLEAVED ? at + 1 : columns + k;
    const float *row = first + (size_t)position * width;
    const size_t biases = (size_t)owners[position] * width;
    float x = row[at] + (bias ? load(bias, biases + at, bias_type) : 0);
    float up = 1;
    if (GATED) {
        up = row[beside] + (bias ? load(bias, biases + beside, bias_type) : 0);
        x = x > limit ? limit : x, up = (up > limit ? limit : up < -limit ? -limit : up) + offset;  // what is no number stays so
    }
    inner[(size_t)position * columns + k] = bent(x * alpha) / alpha * up;
}

#endif

// y[token] = the sum over its slots, in the router's order, of weight times what its expert made of it.
extern "C" __global__ void __launch_bounds__(THREADS)
combine(const float *last, const int *positions, const int *owners, const void *weights, int weights_type, const void *bias,
        int bias_type, int ranks, int columns, void *y, int y_type) {
    wait_for_previous_kernel();
    const int token = blockIdx.x, k = blockIdx.y * THREADS + threadIdx.x;
    if (k >= columns) return;
    float sum = 0;
    for (int rank = 0; rank < ranks; rank++) {
        const int slot = token * ranks + rank, position = positions[slot];
        if (position < 0) continue;
        const float value = last[(size_t)position * columns + k] + (bias ? load(bias, (size_t)owners[position] * columns + k, bias_type) : 0);
        sum += load(weights, slot, weights_type) * value;
    }
    store(y, (size_t)token * columns + k, y_type, sum);
}
