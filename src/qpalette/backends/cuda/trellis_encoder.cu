// Viterbi search over the bitshift trellis of a tail-biting code. A block of threads searches TILES tiles at a time.
//
// The recursion and its rounding are those of codes/trellis.py, operation by operation (no fused multiply-add), so
// that codes are equal bit for bit. M_t, the least cost per group of states, lives in shared memory, double-buffered; a
// thread owns SIBLINGS groups that share their predecessors, for LANES tiles at once: one load of a predecessor's cost
// and of a state's value serves SIBLINGS * LANES and LANES evaluations.
//
// Flipping a state's oldest bit negates its value: a value is loaded once for two candidates.
//
// Values come from L2, or from shared memory where few tiles leave room for them: with two tiles per block, reading them
// from L2 at every step would take as long as the search. Pairs of values lie there as half2, to be multiplied by `factor`:
// exact, see codes/tcq2.py.
//
// Compile-time constants: MEMORY (bits of a state), VALUES (weights per step), STEPS, SHIFT_LOW, SHIFT_HIGH (bits that
// enter at a step), TILES, LANES, MOST_SIBLINGS, THREADS, COSTS_IN_SHARED, VALUES_IN_SHARED.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#if SHIFT_HIGH > 8
typedef u16 Winner;
#else
typedef u8 Winner;
#endif

constexpr float UNREACHABLE = 1e30f;
constexpr u32 MOST_GROUPS = 1u << (MEMORY - SHIFT_LOW);

// N floats by as few instructions as their number allows; `source` is aligned to N floats where N is a power of two.
template <int N>
__device__ __forceinline__ void load(float (&out)[N], const float *source) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            const float4 part = ((const float4 *)source)[i];
            out[4 * i] = part.x, out[4 * i + 1] = part.y, out[4 * i + 2] = part.z, out[4 * i + 3] = part.w;
        }
    } else if constexpr (N == 2) {
        const float2 part = *(const float2 *)source;
        out[0] = part.x, out[1] = part.y;
    } else {
        out[0] = *source;
    }
}

struct Search {
    const float *__restrict__ values;  // [2^MEMORY][VALUES]
    const u32 *shared_values;          // [2^(MEMORY - 1)], float or half2
    float factor;
    const u8 *shifts;     // [STEPS]
    Winner *winners;      // [TILES][STEPS][MOST_GROUPS]
    float *sources;       // shared, [STEPS][VALUES][TILES]
};

__device__ __forceinline__ float half_to_float(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}

__device__ __forceinline__ u32 to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// The values of SIBLINGS states from `state` on, which is below 2^(MEMORY - 1).
template <int SIBLINGS>
__device__ __forceinline__ void load_values(float (&value)[SIBLINGS * VALUES], const Search &search, u32 state) {
    if constexpr (!VALUES_IN_SHARED) {
        load(value, search.values + state * VALUES);
    } else if constexpr (VALUES == 1) {
        load(value, (const float *)search.shared_values + state);
    } else {
        float pairs[SIBLINGS];
        load(pairs, (const float *)search.shared_values + state);
        for (int b = 0; b < SIBLINGS; b++) {
            value[2 * b] = __fmul_rn(half_to_float(__float_as_uint(pairs[b])), search.factor);
            value[2 * b + 1] = __fmul_rn(half_to_float(__float_as_uint(pairs[b]) >> 16), search.factor);
        }
    }
}

__device__ __forceinline__ void fill_values(u32 *out, const float *values, float factor) {
    for (u32 state = threadIdx.x; state < 1u << (MEMORY - 1); state += THREADS) {
        if constexpr (VALUES == 1) out[state] = __float_as_uint(values[state]);
        else out[state] = to_half(__fdiv_rn(values[2 * state], factor)) | to_half(__fdiv_rn(values[2 * state + 1], factor)) << 16;
    }
}

template <int INTO, int OUT>
__device__ void step(const Search &search, const float *before, float *after, int row, int t) {
    constexpr u32 GROUP_BITS = MEMORY - OUT;
    constexpr u32 GROUPS = 1u << GROUP_BITS;
    constexpr u32 FAMILY = INTO < (int)GROUP_BITS ? 1u << INTO : GROUPS;
    constexpr u32 SIBLINGS = FAMILY < MOST_SIBLINGS ? FAMILY : MOST_SIBLINGS;
    constexpr u32 CANDIDATES = 1u << OUT;
    constexpr u32 ITEMS = GROUPS / SIBLINGS * (TILES / LANES);
    for (u32 item = threadIdx.x; item < ITEMS; item += THREADS) {
        const u32 lane0 = item % (TILES / LANES) * LANES;
        const u32 first = item / (TILES / LANES) * SIBLINGS;
        float x[VALUES][LANES];
        for (int v = 0; v < VALUES; v++) load(x[v], search.sources + (t * VALUES + v) * TILES + lane0);
        int best[SIBLINGS][LANES];
        for (int b = 0; b < (int)SIBLINGS; b++)
            for (int i = 0; i < LANES; i++) best[b][i] = 0x7fffffff;
#pragma unroll 2
        for (u32 j = 0; j < CANDIDATES / 2; j++) {
            const u32 state = (j << GROUP_BITS) | first, opposite = state | 1u << (MEMORY - 1);
            float arrived[LANES], arrived_opposite[LANES], value[SIBLINGS * VALUES];
            load(arrived, before + (state >> INTO) * TILES + lane0);
            load(arrived_opposite, before + (opposite >> INTO) * TILES + lane0);
            load_values<SIBLINGS>(value, search, state);
#pragma unroll
            for (int b = 0; b < (int)SIBLINGS; b++) {
#pragma unroll
                for (int i = 0; i < LANES; i++) {
                    float near = __fsub_rn(x[0][i], value[b * VALUES]), far = __fadd_rn(x[0][i], value[b * VALUES]);
                    near = __fmul_rn(near, near), far = __fmul_rn(far, far);
                    if (VALUES == 2) {
                        const float y = x[VALUES - 1][i], v = value[b * VALUES + VALUES - 1];
                        const float near2 = __fsub_rn(y, v), far2 = __fadd_rn(y, v);
                        near = __fadd_rn(near, __fmul_rn(near2, near2)), far = __fadd_rn(far, __fmul_rn(far2, far2));
                    }
                    near = __fadd_rn(near, arrived[i]), far = __fadd_rn(far, arrived_opposite[i]);
                    const int cost_bits = ~(int)(CANDIDATES - 1);
                    best[b][i] = min(best[b][i], (__float_as_int(near) & cost_bits) | (int)j);
                    best[b][i] = min(best[b][i], (__float_as_int(far) & cost_bits) | (int)(j + CANDIDATES / 2));
                }
            }
        }
        for (int b = 0; b < (int)SIBLINGS; b++)
            for (int i = 0; i < LANES; i++)
                after[(first + b) * TILES + lane0 + i] = __int_as_float(best[b][i] & ~(int)(CANDIDATES - 1));
        for (int i = 0; i < LANES; i++) {
            Winner *out = search.winners + ((size_t)(lane0 + i) * STEPS + row) * MOST_GROUPS + first;
            for (int b = 0; b < (int)SIBLINGS; b++) out[b] = (Winner)(best[b][i] & (CANDIDATES - 1));
        }
    }
}

__device__ void forward(const Search &search, float *costs[2], int start) {
    for (int i = 0; i < STEPS; i++) {
        const int t = (start + i) % STEPS;
        const int into = search.shifts[t], out = search.shifts[(t + 1) % STEPS];
        const float *before = costs[i % 2];
        float *after = costs[(i + 1) % 2];
        if (into == SHIFT_LOW && out == SHIFT_LOW) step<SHIFT_LOW, SHIFT_LOW>(search, before, after, i, t);
#if SHIFT_HIGH != SHIFT_LOW
        else if (into == SHIFT_LOW) step<SHIFT_LOW, SHIFT_HIGH>(search, before, after, i, t);
        else if (out == SHIFT_LOW) step<SHIFT_HIGH, SHIFT_LOW>(search, before, after, i, t);
        else step<SHIFT_HIGH, SHIFT_HIGH>(search, before, after, i, t);
#endif
        __syncthreads();
    }
}

// From `group` after the last step back to before step `stop`; writes states unless `states` is null.
__device__ u32 trace_back(const Search &search, int start, int stop, u32 group, int tile, int *states) {
    for (int i = STEPS - 1; i >= stop; i--) {
        const int t = (start + i) % STEPS;
        const u32 winner = search.winners[((size_t)tile * STEPS + i) * MOST_GROUPS + group];
        const u32 state = (winner << (MEMORY - search.shifts[(t + 1) % STEPS])) | group;
        if (states) states[t] = (int)state;
        group = state >> search.shifts[t];
    }
    return group;
}

// The first of the groups of least cost, for tile `tile`, by one warp.
__device__ u32 least(const float *costs, u32 groups, int tile) {
    float cost = UNREACHABLE * 2;
    u32 best = 0;
    for (u32 group = threadIdx.x % 32; group < groups; group += 32)
        if (costs[group * TILES + tile] < cost) cost = costs[group * TILES + tile], best = group;
    for (int distance = 16; distance; distance /= 2) {
        const float other = __shfl_down_sync(~0u, cost, distance);
        const u32 group = __shfl_down_sync(~0u, best, distance);
        if (other < cost || (other == cost && group < best)) cost = other, best = group;
    }
    return best;
}

// sources [tiles][256] in scan order -> states [tiles][STEPS]; tiles is a multiple of TILES.
extern "C" __global__ void __launch_bounds__(THREADS)
encode(const float *sources, const float *values, float factor, const u8 *shifts, int tiles, Winner *winners, float *spilled,
       int *states) {
    extern __shared__ float shared[];
    __shared__ u8 own_shifts[STEPS];
    __shared__ u32 seam[TILES];
    constexpr size_t COSTS = (size_t)MOST_GROUPS * TILES;
    u32 *shared_values = (u32 *)shared;
    float *sources_there = shared + (VALUES_IN_SHARED ? 1 << (MEMORY - 1) : 0);
    Search search{values, shared_values, factor, own_shifts, winners + (size_t)blockIdx.x * TILES * STEPS * MOST_GROUPS, sources_there};
    float *room = COSTS_IN_SHARED ? sources_there + STEPS * VALUES * TILES : spilled + blockIdx.x * 2 * COSTS;
    if (VALUES_IN_SHARED) fill_values(shared_values, values, factor);
    float *costs[2] = {room, room + COSTS};
    for (int t = threadIdx.x; t < STEPS; t += THREADS) own_shifts[t] = shifts[t];
    for (int batch = blockIdx.x; batch * TILES < tiles; batch += gridDim.x) {
        __syncthreads();
        for (int i = threadIdx.x; i < STEPS * VALUES * TILES; i += THREADS)
            sources_there[(i % (STEPS * VALUES)) * TILES + i / (STEPS * VALUES)] = sources[(size_t)batch * TILES * STEPS * VALUES + i];
        for (size_t i = threadIdx.x; i < COSTS; i += THREADS) costs[0][i] = 0;
        __syncthreads();
        forward(search, costs, STEPS / 2);
        for (int tile = threadIdx.x / 32; tile < TILES; tile += THREADS / 32) {
            const u32 best = least(costs[STEPS % 2], 1u << (MEMORY - own_shifts[STEPS / 2]), tile);
            if (threadIdx.x % 32 == 0) seam[tile] = trace_back(search, STEPS / 2, STEPS / 2, best, tile, nullptr);
        }
        __syncthreads();
        for (size_t i = threadIdx.x; i < COSTS; i += THREADS)
            costs[0][i] = i / TILES == seam[i % TILES] ? 0 : UNREACHABLE;
        __syncthreads();
        forward(search, costs, 0);
        for (int tile = threadIdx.x / 32; tile < TILES; tile += THREADS / 32)
            if (threadIdx.x % 32 == 0)
                trace_back(search, 0, 0, seam[tile], tile, states + ((size_t)batch * TILES + tile) * STEPS);
    }
}
