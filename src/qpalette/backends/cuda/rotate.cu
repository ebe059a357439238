// x' = Q diag(d) x for the one product or group that follows, written in the order in which `multiply` reads it.
//
// Q = I (x) A (x) H: A any dense matrix of order DENSE, H the Hadamard matrix of order 2^LOG_H. A block makes LINES * EACH
// rows of A's output for one token: it reads the whole of the token's block of x (from L2; 8 to 28 KB), so that no block
// waits for another. A thread has VALUES columns of EACH rows. Then H runs in registers, by shuffles, with one exchange
// through shared memory.
//
// Few blocks: a product has one on nearly every multiprocessor, and starts late on those where it finds a rotation.
//
// With NORM the input goes through RMSNorm first (x / rms(x) * weight).
//
// Compile-time constants: DENSE, LOG_H, LOG_VALUES, LINES, EACH (1, or a divisor of DENSE), NORM, SIGNS (d: 1 packed signs, 0
// float16 values), TABLED (a token's diagonal is that of its owner), and those of rotate.cuh.

constexpr int H = 1 << LOG_H, VALUES = 1 << LOG_VALUES, ROW_THREADS = H / VALUES, BLOCK = DENSE * H, GROUP = LINES * EACH;
constexpr int THREADS = (ROW_THREADS * LINES + 31) / 32 * 32;
constexpr int EACH_ROOM = EACH > 2 ? (EACH + 3) / 4 * 4 : EACH;  // so that factors are loaded four at a time
constexpr int SHUFFLED = LOG_H - LOG_VALUES < 5 ? LOG_H - LOG_VALUES : 5;  // bits of a lane's number that are of its place in H
constexpr int HIGH = 1 << (LOG_H - LOG_VALUES - SHUFFLED);                 // what is left, behind the exchange
constexpr int LOW = H / HIGH;
constexpr int PART = DENSE < 32 / VALUES ? DENSE : 32 / VALUES;  // of x's elements for a column, in registers
constexpr bool SCALED = NORM || !SIGNS;  // the norm of what is rotated is not x's

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
            leave_zeros<THREADS>(zeros, zero_count);
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
        for (int v = 0; v < VALUES; v++) values[e].of[v] = shuffled_butterflies<SHUFFLED>(values[e].of[v]);
        if (own < LINES) *(Values *)&room[(own * EACH + e) * H + column] = values[e];
    }
    __syncthreads();
    float factor = 1, norm = sqrtf(sum_of_warps<THREADS / 32>(squares));
    if (NORM) factor = rsqrtf(squared(norm) / inputs + epsilon);
    if (SCALED) norm = sqrtf(sum_of_warps<THREADS / 32>(weighted_squares)) * factor;
    const float scale = divisor_of(norm);
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
    if (blockIdx.y == 0) finish_token<THREADS>(token, inputs, padded, out, scales, scale, norm);
}
