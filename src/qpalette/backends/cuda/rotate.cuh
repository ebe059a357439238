// What the rotations of this folder share: how a token is divided, sums and butterflies, and where x' has its place.
//
// A token is divided by a power of two near the norm of diag(d) x: rotated values are at most that, so float16 cannot
// overflow. For a library's product (BATCH 0) it is divided only where it would leave the range in which float16 has all its
// bits: nearly every product is then finished as it is. A bfloat16 token is never divided there, and stays bfloat16.
//
// Compile-time constants: IN_TYPE, BATCH (0 and 1: tokens one by one), CORES (the order within 32 inputs of eight columns: 1
// as wgmma reads them, [eight inputs][column], 0 as a lane has them, [column][lane]).

constexpr bool BFLOAT16 = IN_TYPE == 1 && BATCH == 0;  // of x'
constexpr float TARGET_NORM = 128;  // of a scaled token: typical values near 1, none above 128
constexpr float LEAST_NORM = 1. / 16, MOST_NORM = 32768;  // of one that float16 holds as it is: of 16384 inputs a typical value
                                                          // is LEAST_NORM / 128, eight times the least normal number

// What a token of this norm is divided by.
__device__ __forceinline__ float divisor_of(float norm) {
    // The power of two that brings the norm to [TARGET_NORM / 2, TARGET_NORM), from its exponent alone.
    const float power = norm > 0 ? __uint_as_float(min(max(__float_as_uint(norm) & 0x7f800000u, 0x08000000u), 0x7e000000u)) : 1;
    const bool as_it_is = BFLOAT16 || (BATCH == 0 && norm >= LEAST_NORM && norm < MOST_NORM);
    return as_it_is ? 1 : power * (2 / TARGET_NORM);
}

__device__ __forceinline__ float squared(float value) { return value * value; }

// `value` summed over a warp, left in `room` by each; `sum_of_warps` adds them, after a barrier.
__device__ __forceinline__ void leave_sum_of_warp(float value, float *room) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
}

template <int WARPS>
__device__ __forceinline__ float sum_of_warps(const float *room) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += room[warp];
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

// Butterflies over the low BITS of the lane's number.
template <int BITS>
__device__ __forceinline__ float shuffled_butterflies(float value) {
#pragma unroll
    for (int bit = 0; bit < BITS; bit++) {
        const float sign = threadIdx.x >> bit & 1 ? -1 : 1;
        value = __shfl_xor_sync(~0u, value, 1 << bit) + sign * value;
    }
    return value;
}

constexpr int ALL_COLUMNS = BATCH ? BATCH : 1;

// Where input `k` of a token lies in x', in halves; 32 inputs further on it is 32 * ALL_COLUMNS. Tokens come ALL_COLUMNS at a
// time, each lot with all its inputs.
__device__ __forceinline__ size_t place(u32 k, u32 token, int padded) {
    constexpr int columns = ALL_COLUMNS > 8 ? 8 : ALL_COLUMNS;
    const u32 lane = k % 8 / 2, element = k % 32 / 16 * 4 + k % 16 / 8 * 2 + k % 2, column = token % ALL_COLUMNS;
    const size_t first = (size_t)(token / ALL_COLUMNS) * ALL_COLUMNS * padded + (size_t)(k / 32) * 32 * ALL_COLUMNS;
    const u32 within = CORES ? k % 32 / 8 * 64 + column % 8 * 8 + k % 8 : lane * 8 + element + column % 8 * 32;
    return first + within + column / 8 * 32 * columns;
}

// The grid's threads, THREADS of a block, set to zero what the product after them adds to.
template <int THREADS>
__device__ __forceinline__ void leave_zeros(uint4 *zeros, int count) {
    const int first = (blockIdx.y * gridDim.x + blockIdx.x) * THREADS + threadIdx.x;
    for (int i = first; i < count; i += gridDim.x * gridDim.y * THREADS) zeros[i] = {};
}

// What a token has beside its values: zeros behind its inputs, and its divisor.
template <int THREADS>
__device__ __forceinline__ void finish_token(int token, int inputs, int padded, u16 *out, float *scales, float scale, float norm) {
    for (int k = inputs + threadIdx.x; k < padded; k += THREADS) out[place(k, token, padded)] = 0;
    if (threadIdx.x == 0) scales[token] = scale + norm * 0;  // a token that is not finite stays so: integer sums would lose it
}
