// What stands around the products of a layer of experts: the plan of its runs, where slots are many, and the weighted sum.
//
// Compile-time constant: THREADS.

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

// index [slots] -> runs, and the slots in their order: always the same for the same index. One block; a thread has an expert, and
// slots, for which its warp takes its turn: so that their ranks are those of the slots' order. The kernel before is a rotation
// that has waited for what gave the index, and beside which this one runs: it waits for that rotation's end at its own.
extern "C" __global__ void __launch_bounds__(THREADS)
plan_runs(const long long *index, int slots, int experts, const Expert *table, int *ranks, int *order, Run *runs, Plan *plan) {
    __shared__ int of_places[THREADS];  // slots so far; then the first of them in the order
    __shared__ Expert by_place[THREADS];
    const int thread = threadIdx.x, lane = thread % 32;
    let_next_kernel_start();
    of_places[thread] = 0;
    if (thread < experts) by_place[table[thread].place] = table[thread];
    for (int start = 0; start < slots; start += THREADS) {
        const int slot = start + thread, expert = slot < slots ? expert_of(index, slot, experts) : -1;
        const int place = expert < 0 ? -1 : table[expert].place;
        const u32 alike = __match_any_sync(~0u, place);
        for (int turn = 0; turn < min(THREADS, slots - start); turn += 32) {
            __syncthreads();
            if (thread - lane != turn) continue;
            const int before = place < 0 ? 0 : of_places[place];
            __syncwarp();
            if (place >= 0 && alike >> lane == 1) of_places[place] = before + __popc(alike);  // the last of them
            if (slot < slots) ranks[slot] = before + __popc(alike & ((1u << lane) - 1));
        }
    }
    __syncthreads();
    const int count = of_places[thread], cut = (count + RUN - 1) / RUN;
    const Expert own = thread < experts ? by_place[thread] : Expert{};
    Sums total;
    const Sums before = sums_before({count, cut, cut * own.cost[0], cut * own.cost[1]}, total);
    for (int i = 0; i < cut; i++) {
        Run run = {thread, before.of[0] + i * RUN, min(RUN, count - i * RUN), {}};
        for (int p = 0; p < 2; p++) run.begin[p] = before.of[2 + p] + i * own.cost[p];
        runs[before.of[1] + i] = run;
    }
    of_places[thread] = before.of[0];
    __syncthreads();
    for (int slot = thread; slot < slots; slot += THREADS) {
        const int expert = expert_of(index, slot, experts);
        if (expert >= 0) order[of_places[table[expert].place] + ranks[slot]] = slot;  // a rank that this thread has written
    }
    if (thread == 0) *plan = {{total.of[2], total.of[3]}, total.of[1]};
    wait_for_previous_kernel();
}

constexpr int AHEAD = 8;  // slots of a token whose experts and weights are loaded before the products have ended

// y[token] = the sum over its slots, in the router's order, of weight times what its expert made of it.
extern "C" __global__ void __launch_bounds__(THREADS)
combine(const float *last, const long long *index, const void *weights, int weights_type, const void *bias, int bias_type,
        int ranks, int experts, int columns, void *y, int y_type) {
    const int token = blockIdx.x, k = min((int)(blockIdx.y * THREADS + threadIdx.x), columns - 1);
    float sum = 0;
    for (int first = 0; first < ranks; first += AHEAD) {
        int owners[AHEAD];
        float factors[AHEAD], values[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const bool there = first + i < ranks;
            const int slot = token * ranks + first + i;
            owners[i] = there ? expert_of(index, slot, experts) : -1, factors[i] = there ? load(weights, slot, weights_type) : 0;
        }
        if (first == 0) wait_for_previous_kernel();
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            values[i] = owners[i] < 0 ? 0 : last[(size_t)(token * ranks + first + i) * columns + k];
            if (bias && owners[i] >= 0) values[i] += load(bias, (size_t)owners[i] * columns + k, bias_type);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (owners[i] >= 0) sum += factors[i] * values[i];
    }
    if (blockIdx.y * THREADS + threadIdx.x < columns) store(y, (size_t)token * columns + k, y_type, sum);
}
