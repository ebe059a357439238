// x' = Q diag(s) x for the one product or group that follows, written in the order in which `multiply` reads it.
//
// Q = I (x) A (x) H: A any dense matrix of order DENSE, H the Hadamard matrix of order 2^LOG_H. A block makes GROUP rows of
// A's output for one token: it reads the whole of the token's block of x (from L2; 8 to 28 KB), so that no block waits
// for another. Then H runs in registers, by shuffles, with one exchange through shared memory.
//
// A token is divided by a power of two near its norm: rotated values are at most the norm, so float16 cannot overflow.
// With NORM the input goes through RMSNorm first (x / rms(x) * weight).
//
// Compile-time constants: DENSE, LOG_H, GROUP, IN_TYPE (0 float16, 1 bfloat16, 2 float32), NORM, BATCH (0: row-major).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int H = 1 << LOG_H, THREADS = H * GROUP < 64 ? 64 : H * GROUP, BLOCK = DENSE * H;
constexpr int COLUMNS = BATCH > 8 ? 8 : BATCH;
constexpr int PART = DENSE < 32 ? DENSE : 32;  // of a row of A, in registers
constexpr float TARGET_NORM = 128;  // of a scaled token: typical values near 1, none above 128

__device__ __forceinline__ float load(const void *x, size_t i) {
    float value;
    if (IN_TYPE == 2) return ((const float *)x)[i];
    const u16 bits = ((const u16 *)x)[i];
    if (IN_TYPE == 1) return __uint_as_float((u32)bits << 16);
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

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

__device__ __forceinline__ float squared(float value) { return value * value; }

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Butterflies over the bits [from, to) of the thread's number, all within a warp.
__device__ __forceinline__ float butterflies(float value, int from, int to) {
#pragma unroll
    for (int bit = from; bit < to; bit++) {
        const float other = __shfl_xor_sync(~0u, value, 1 << bit);
        value = threadIdx.x >> bit & 1 ? other - value : value + other;
    }
    return value;
}

// Where input `k` of token `column` lies in x', in halves: see multiply.cu.
__device__ __forceinline__ size_t place(int k, int column, int padded) {
    if (BATCH == 0) return (size_t)column * padded + k;
    const int lane = k % 8 / 2, element = k % 32 / 16 * 4 + k % 16 / 8 * 2 + k % 2;
    return (size_t)(k / 32) * 32 * BATCH + column / 8 * 32 * COLUMNS + column % 8 * 32 + lane * 8 + element;
}

extern "C" __global__ void __launch_bounds__(THREADS)
rotate(const void *x, long long x_stride, const u8 *signs, const float *dense, const void *weight, float epsilon, int inputs,
       int padded, u16 *out, float *scales) {
    __shared__ float room[THREADS], squares[THREADS / 32], weighted_squares[THREADS / 32];
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const int token = blockIdx.y, thread = threadIdx.x;
    const size_t start = token * x_stride;
    const int row = blockIdx.x * GROUP + thread / H;  // of all blocks' dense rows
    const int base = row / DENSE * BLOCK, column = thread % H;
    const bool working = thread < H * GROUP && base < inputs;
    const int safe_base = working ? base : 0;         // the others load something, and throw it away
    const float *line = dense + row % DENSE;          // transposed: consecutive rows of A lie side by side
    float value = 0, square = 0, weighted = 0;
    for (int part = 0; part < DENSE; part += PART) {
        float factors[PART], elements[PART];
#pragma unroll
        for (int i = 0; i < PART; i++) {
            const int a = min(part + i, DENSE - 1), k = safe_base + a * H + column;
            const float factor = working && part + i < DENSE ? line[a * DENSE] : 0;
            factors[i] = signs[k / 8] >> k % 8 & 1 ? -factor : factor;
            if (NORM) factors[i] *= load(weight, k);
        }
        if (part == 0) wait_for_previous_kernel();  // nothing above depends on it
#pragma unroll
        for (int i = 0; i < PART; i++) elements[i] = load(x, start + safe_base + min(part + i, DENSE - 1) * H + column);
#pragma unroll
        for (int i = 0; i < PART; i++) {
            value += elements[i] * factors[i];
            if (working && thread < H && part + i < DENSE) {  // the threads of one dense row read the whole block of x
                square += elements[i] * elements[i];
                if (NORM) weighted += squared(elements[i] * load(weight, safe_base + (part + i) * H + column));
            }
        }
    }
    const int own = blockIdx.x * GROUP / DENSE * BLOCK;  // where the block of x begins that the first H threads have read
    for (int i = thread; i < inputs - BLOCK; i += THREADS) {  // block-diagonal rotations: the others count in the norm
        const int k = i < own ? i : i + BLOCK;
        const float element = load(x, start + k);
        square += squared(element);
        if (NORM) weighted += squared(element * load(weight, k));
    }
    leave_sum_of_warp(square, squares);
    if (NORM) leave_sum_of_warp(weighted, weighted_squares);
    room[thread] = value = butterflies(value, 0, LOG_H < 5 ? LOG_H : 5);
    __syncthreads();
    int position = column;
    if (LOG_H > 5) {  // swap the five low bits of the thread's number with the five above
        constexpr int high = LOG_H > 5 ? LOG_H - 5 : 0, rest = 1 << high;
        position = thread % H / rest + thread % rest * 32;
        value = butterflies(room[thread / H * H + position], 0, high);
    }
    float factor = 1, norm = sqrtf(sum_of_warps(squares));
    if (NORM) {
        factor = rsqrtf(squared(norm) / inputs + epsilon);
        norm = sqrtf(sum_of_warps(weighted_squares)) * factor;
    }
    // The power of two that brings the norm to [TARGET_NORM / 2, TARGET_NORM), from its exponent alone.
    const float power = norm > 0 ? __uint_as_float(min(max(__float_as_uint(norm) & 0x7f800000u, 0x08000000u), 0x7e000000u)) : 1;
    const float scale = power * (2 / TARGET_NORM);
    if (working) out[place(base + row % DENSE * H + position, token, padded)] = to_half(value * (factor / scale));
    if (blockIdx.x == 0) {
        for (int k = inputs + thread; k < padded; k += THREADS) out[place(k, token, padded)] = 0;
        if (thread == 0) scales[token] = scale + norm * 0;  // a token that is not finite stays so: integer sums would lose it
    }
}
