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

// index [slots] -> runs, in the order of experts, an expert's slots in their own: always the same for the same index. One
// block; a thread has an expert, and slots, for which its warp takes its turn: so that their ranks are those of the slots' order.
extern "C" __global__ void __launch_bounds__(THREADS)
plan_runs(const long long *index, int slots, int ranks, int experts, const int *costs, int *tokens, int *owners,
          int *positions, Run *runs, Plan *plan) {
    __shared__ int of_experts[THREADS];  // slots so far; then the first position
    const int thread = threadIdx.x, lane = thread % 32;
    const int cost[2] = {thread < experts ? costs[thread] : 0, thread < experts ? costs[experts + thread] : 0};
    wait_for_previous_kernel();
    let_next_kernel_start();
    of_experts[thread] = 0;
    for (int start = 0; start < slots; start += THREADS) {
        const int slot = start + thread;
        const long long given = slot < slots ? index[slot] : -1;
        const int expert = given < 0 || given >= experts ? -1 : (int)given;
        const u32 alike = __match_any_sync(~0u, expert);
        for (int turn = 0; turn < min(THREADS, slots - start); turn += 32) {
            __syncthreads();
            if (thread - lane != turn) continue;
            const int before = expert < 0 ? 0 : of_experts[expert];
            __syncwarp();
            if (expert >= 0 && alike >> lane == 1) of_experts[expert] = before + __popc(alike);  // the last of them
            if (slot < slots) positions[slot] = expert < 0 ? -1 : before + __popc(alike & ((1u << lane) - 1));
        }
    }
    __syncthreads();
    const int count = of_experts[thread], cut = (count + RUN - 1) / RUN;
    Sums total;
    const Sums before = sums_before({count, cut, cut * cost[0], cut * cost[1]}, total);
    for (int i = 0; i < cut; i++) {
        Run run = {thread, before.of[0] + i * RUN, min(RUN, count - i * RUN), {}};
        for (int p = 0; p < 2; p++) run.begin[p] = before.of[2 + p] + i * cost[p];
        runs[before.of[1] + i] = run;
    }
    of_experts[thread] = before.of[0];
    __syncthreads();
    for (int slot = thread; slot < slots; slot += THREADS) {
        const int rank = positions[slot];  // written by this thread
        if (rank < 0) continue;
        const int expert = (int)index[slot], position = of_experts[expert] + rank;
        tokens[position] = slot / ranks, owners[position] = expert, positions[slot] = position;
    }
    for (int rest = total.of[0] + thread; rest < slots; rest += THREADS) tokens[rest] = owners[rest] = 0;  // of no slot
    if (thread == 0) *plan = {{total.of[2], total.of[3]}, total.of[1], total.of[0]};
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
