// x' = Q diag(d) x for the one product or group that follows, written in the order in which `multiply` reads it.
//
// Q = I (x) A (x) H: A any dense matrix of order DENSE, H the Hadamard matrix of order 2^LOG_H. A block makes LINES * EACH
// rows of A's output for one token: it reads the whole of the token's block of x (from L2; 8 to 28 KB), so that no block
// waits for another. A thread has VALUES columns of EACH rows. Then H runs in registers, by shuffles, with one exchange
// through shared memory.
//
// Few blocks: a product has one on nearly every multiprocessor, and starts late on those where it finds a rotation.
//
// A token is divided by a power of two near the norm of diag(d) x: rotated values are at most that, so float16 cannot
// overflow. For a library's product (BATCH 0) it is divided only where it would leave the range in which float16 has all its
// bits: nearly every product is then finished as it is. A bfloat16 token is never divided there, and stays bfloat16. With
// NORM the input goes through RMSNorm first (x / rms(x) * weight).
//
// Compile-time constants: DENSE, LOG_H, LOG_VALUES, LINES, EACH (1, or a divisor of DENSE), IN_TYPE, NORM, SIGNS (d: 1 packed
// signs, 0 float16 values), BATCH (0 and 1: tokens one by one), TABLED (a token's diagonal is that of its owner), CORES (the
// order within 32 inputs of eight columns: 1 as wgmma reads them, [eight inputs][column], 0 as a lane has them, [column][lane]).

constexpr int H = 1 << LOG_H, VALUES = 1 << LOG_VALUES, ROW_THREADS = H / VALUES, BLOCK = DENSE * H, GROUP = LINES * EACH;
constexpr int THREADS = (ROW_THREADS * LINES + 31) / 32 * 32;
constexpr int EACH_ROOM = EACH > 2 ? (EACH + 3) / 4 * 4 : EACH;  // so that factors are loaded four at a time
constexpr int SHUFFLED = LOG_H - LOG_VALUES < 5 ? LOG_H - LOG_VALUES : 5;  // bits of a lane's number that are of its place in H
constexpr int HIGH = 1 << (LOG_H - LOG_VALUES - SHUFFLED);                 // what is left, behind the exchange
constexpr int LOW = H / HIGH;
constexpr int PART = DENSE < 32 / VALUES ? DENSE : 32 / VALUES;  // of x's elements for a column, in registers
constexpr bool SCALED = NORM || !SIGNS;  // the norm of what is rotated is not x's
constexpr bool BFLOAT16 = IN_TYPE == 1 && BATCH == 0;
constexpr float TARGET_NORM = 128;  // of a scaled token: typical values near 1, none above 128
constexpr float LEAST_NORM = 1. / 16, MOST_NORM = 32768;  // of one that float16 holds as it is: of 16384 inputs a typical value
                                                          // is LEAST_NORM / 128, eight times the least normal number

struct __align__(4 * VALUES) Values { float of[VALUES]; };  // loaded and stored at once

template <int TYPE>
__device__ __forceinline__ Values load_values(const void *x, size_t i) {
    Values values;
    if constexpr (TYPE == 2 || VALUES == 1) {
#pragma unroll
        for (int v = 0; v < VALUES; v++) values.of[v] = load(x, i + v, TYPE);
    } else {
        u32 pairs[(VALUES + 1) / 2];
        if constexpr (VALUES == 4) {
            const uint2 both = *(const uint2 *)((const u16 *)x + i);
            pairs[0] = both.x, pairs[1] = both.y;
        } else pairs[0] = *(const u32 *)((const u16 *)x + i);
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
            const u16 bits = v % 2 ? pairs[v / 2] >> 16 : pairs[v / 2] & 0xffff;
            values.of[v] = TYPE == 1 ? __uint_as_float((u32)bits << 16) : half_to_float(bits);
        }
    }
    return values;
}

__device__ __forceinline__ float squared(float value) { return value * value; }

// `value` summed over a warp, left in `room` by each; `sum_of_warps` adds them, after a barrier.
__device__ __forceinline__ void leave_sum_of_warp(float value, float *room) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
}

__device__ __forceinline__ float sum_of_warps(const float *room) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; warp++) sum += room[warp];
    return sum;
}

// Butterflies over the bits of an index into registers.
template <int COUNT>
__device__ __forceinline__ void butterflies(float (&values)[COUNT]) {
#pragma unroll
    for (int bit = 1; bit < COUNT; bit *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (!(i & bit)) {
                const float low = values[i], high = values[i | bit];
                values[i] = low + high, values[i | bit] = low - high;
            }
}

// Butterflies over the SHUFFLED low bits of the lane's number.
__device__ __forceinline__ float shuffled_butterflies(float value) {
#pragma unroll
    for (int bit = 0; bit < SHUFFLED; bit++) {
        const float other = __shfl_xor_sync(~0u, value, 1 << bit);
        value = threadIdx.x >> bit & 1 ? other - value : value + other;
    }
    return value;
}

constexpr int ALL_COLUMNS = BATCH ? BATCH : 1;

// Where input `k` of a token lies in x', in halves; 32 inputs further on it is 32 * ALL_COLUMNS. Tokens come ALL_COLUMNS at a
// time, each lot with all its inputs.
__device__ __forceinline__ size_t place(int k, int token, int padded) {
    constexpr int columns = ALL_COLUMNS > 8 ? 8 : ALL_COLUMNS;
    const int lane = k % 8 / 2, element = k % 32 / 16 * 4 + k % 16 / 8 * 2 + k % 2, column = token % ALL_COLUMNS;
    const size_t first = (size_t)(token / ALL_COLUMNS) * ALL_COLUMNS * padded + (size_t)(k / 32) * 32 * ALL_COLUMNS;
    const int within = CORES ? k % 32 / 8 * 64 + column % 8 * 8 + k % 8 : lane * 8 + element + column % 8 * 32;
    return first + within + column / 8 * 32 * columns;
}

extern "C" __global__ void __launch_bounds__(THREADS)
rotate(const void *x, long long x_stride, const void *diagonals, const float *dense, const void *weight, float epsilon, int inputs,
       int padded, u16 *out, float *scales, const int *owners, uint4 *zeros, int zero_count) {
    extern __shared__ __align__(16) float room[];  // [GROUP * H]
    __shared__ float squares[THREADS / 32], weighted_squares[THREADS / 32];
    __shared__ __align__(16) float factors[DENSE][LINES][EACH_ROOM];
    let_next_kernel_start();  // a product, which waits
    const int token = blockIdx.x, thread = threadIdx.x;
    if (TABLED) wait_for_previous_kernel();
    const void *diagonal = TABLED ? ((const void *const *)diagonals)[owners[token]] : diagonals;
    const size_t start = token * x_stride;
    const int own = thread / ROW_THREADS, row = blockIdx.y * GROUP + own * EACH;  // of all blocks' dense rows
    const int base = row / DENSE * BLOCK, column = thread % ROW_THREADS * VALUES;
    const bool working = own < LINES && base < inputs;
    const int safe_base = working ? base : 0, line = working ? own : 0;  // the others load something, and throw it away
    for (int i = thread; i < DENSE * GROUP; i += THREADS)  // `dense` is transposed: consecutive rows of A lie side by side
        factors[i / GROUP][i % GROUP / EACH][i % EACH] = dense[i / GROUP * DENSE + (blockIdx.y * GROUP + i % GROUP) % DENSE];
    Values values[EACH] = {};
    float square = 0, weighted = 0;
    for (int part = 0; part < DENSE; part += PART) {
        u8 negative[PART];
        Values elements[PART], input_factors[PART];
#pragma unroll
        for (int i = 0; i < PART; i++) {
            const int k = safe_base + min(part + i, DENSE - 1) * H + column;
            if constexpr (SIGNS) negative[i] = ((const u8 *)diagonal)[k / 8] >> k % 8;
            else input_factors[i] = load_values<0>(diagonal, k);
        }
        if (part == 0) wait_for_previous_kernel();  // nothing above depends on it
#pragma unroll
        for (int i = 0; i < PART; i++) elements[i] = load_values<IN_TYPE>(x, start + safe_base + min(part + i, DENSE - 1) * H + column);
        if (part == 0) {
            const int of_all = gridDim.x * gridDim.y * THREADS;
            for (int i = (blockIdx.y * gridDim.x + blockIdx.x) * THREADS + thread; i < zero_count; i += of_all) zeros[i] = {};
            __syncthreads();  // the factors are there
        }
#pragma unroll
        for (int i = 0; i < PART; i++) {
            if (part + i >= DENSE) break;
            Values weights;
            if (NORM) weights = load_values<IN_TYPE>(weight, safe_base + (part + i) * H + column);
#pragma unroll
            for (int v = 0; v < VALUES; v++) {
                float element = elements[i].of[v];
                square += squared(element);
                if (NORM) element *= weights.of[v];
                if constexpr (!SIGNS) element *= input_factors[i].of[v];
                if (SCALED) weighted += squared(element);
                if constexpr (SIGNS)
                    if (negative[i] >> v & 1) element = -element;
#pragma unroll
                for (int e = 0; e < EACH; e++) values[e].of[v] += element * factors[part + i][line][e];
            }
        }
    }
    if (own) square = weighted = 0;  // one line has seen the whole block of x
    if (inputs > BLOCK) {            // and that is not all of it: in one order for all blocks, whose norms must be the same
        square = weighted = 0;
        for (int k = thread; k < inputs; k += THREADS) {
            float element = load(x, start + k, IN_TYPE);
            square += squared(element);
            if (NORM) element *= load(weight, k, IN_TYPE);
            if (!SIGNS) element *= load(diagonal, k, 0);
            if (SCALED) weighted += squared(element);
        }
    }
    leave_sum_of_warp(square, squares);
    if (SCALED) leave_sum_of_warp(weighted, weighted_squares);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        butterflies(values[e].of);
#pragma unroll
        for (int v = 0; v < VALUES; v++) values[e].of[v] = shuffled_butterflies(values[e].of[v]);
        if (own < LINES) *(Values *)&room[(own * EACH + e) * H + column] = values[e];
    }
    __syncthreads();
    float factor = 1, norm = sqrtf(sum_of_warps(squares));
    if (NORM) factor = rsqrtf(squared(norm) / inputs + epsilon);
    if (SCALED) norm = sqrtf(sum_of_warps(weighted_squares)) * factor;
    // The power of two that brings the norm to [TARGET_NORM / 2, TARGET_NORM), from its exponent alone.
    const float power = norm > 0 ? __uint_as_float(min(max(__float_as_uint(norm) & 0x7f800000u, 0x08000000u), 0x7e000000u)) : 1;
    const bool as_it_is = BFLOAT16 || (BATCH == 0 && norm >= LEAST_NORM && norm < MOST_NORM);
    const float scale = as_it_is ? 1 : power * (2 / TARGET_NORM);
    for (int i = thread; i < GROUP * LOW; i += THREADS) {  // now a thread has all the high bits
        const int row_of_block = i / LOW, low = i % LOW, this_row = blockIdx.y * GROUP + row_of_block;
        if (this_row / DENSE * BLOCK >= inputs) break;
        u16 *to = out + place(this_row / DENSE * BLOCK + this_row % DENSE * H + low, token, padded);
        float high[HIGH];
#pragma unroll
        for (int h = 0; h < HIGH; h++) high[h] = room[row_of_block * H + h * LOW + low];
        butterflies(high);
#pragma unroll
        for (int h = 0; h < HIGH; h++) to[h * LOW * ALL_COLUMNS] = to_bits<BFLOAT16>(high[h] * (factor / scale));  // LOW is 32 or more
    }
    if (blockIdx.y == 0) {
        for (int k = inputs + thread; k < padded; k += THREADS) out[place(k, token, padded)] = 0;
        if (thread == 0) scales[token] = scale + norm * 0;  // a token that is not finite stays so: integer sums would lose it
    }
}
