// What is before and behind a library's product of whole numbers: rotated tokens to int8, and sums to results.
//
// A token is its step times whole numbers, the largest value LARGEST of them; LEAST_EXPONENT is of the least that counts as
// the largest. The order of operations is that of runtime/prefill.py, and so are the bits.
//
// Compile-time constants: THREADS, EACH (tokens of a thread of `finish`), LARGEST, LEAST_EXPONENT.

__device__ __forceinline__ float value_of(u32 bits, int type) {
    return type == 1 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

// Four of the values in two words, as bytes of one.
__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, float factor, int type) {
    const u32 low = __float2int_rn(value_of(a & 0xffff, type) * factor), next = __float2int_rn(value_of(a >> 16, type) * factor);
    const u32 third = __float2int_rn(value_of(b & 0xffff, type) * factor), high = __float2int_rn(value_of(b >> 16, type) * factor);
    return __byte_perm(__byte_perm(low, next, 0x0040), __byte_perm(third, high, 0x0040), 0x5410);
}

struct RotatedTokens {
    const uint4 *values;  // [tokens][columns] float16 or bfloat16
    uint2 *out;           // [tokens][columns] int8
    float *scales;        // [tokens] what a token was divided by; becomes its step
    int columns, type;    // see common.cuh
};

// A block has a token.
extern "C" __global__ void __launch_bounds__(THREADS) tokens_in_int8(const __grid_constant__ RotatedTokens tokens) {
    __shared__ float of_warps[THREADS / 32];
    const int vectors = tokens.columns / 8, type = tokens.type;
    const uint4 *values = tokens.values + (size_t)blockIdx.x * vectors;
    uint2 *out = tokens.out + (size_t)blockIdx.x * vectors;
    u32 most = 0;  // magnitudes are in the order of their bits
    for (int i = threadIdx.x; i < vectors; i += THREADS) {
        const uint4 eight = values[i];
        const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int p = 0; p < 4; p++) most = __vmaxu2(most, pairs[p] & 0x7fff7fffu);
    }
    float largest = fmaxf(value_of(most & 0xffff, type), value_of(most >> 16, type));
    for (int distance = 16; distance; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
    __syncthreads();
    largest = __uint_as_float((127u + LEAST_EXPONENT) << 23);
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; warp++) largest = fmaxf(largest, of_warps[warp]);
    const float factor = LARGEST / largest;
    for (int i = threadIdx.x; i < vectors; i += THREADS) {
        const uint4 eight = values[i];
        out[i] = make_uint2(bytes_of(eight.x, eight.y, factor, type), bytes_of(eight.z, eight.w, factor, type));
    }
    if (threadIdx.x == 0) tokens.scales[blockIdx.x] *= largest / LARGEST;
}

struct Sums {
    const int *sums;           // [tokens][sum_stride]
    const float *token_steps;  // [tokens]
    const u16 *scales;         // [rows] float16
    void *y;                   // [tokens][y_stride]
    long long y_stride;
    int sum_stride, tokens, rows, type;  // type: of y, see common.cuh
    float step;
};

// y = sums times the steps of tokens, and the scales of rows times one step. A thread has four rows, and EACH tokens.
extern "C" __global__ void __launch_bounds__(THREADS) finish(const __grid_constant__ Sums p) {
    const int row = (blockIdx.x * THREADS + threadIdx.x) * 4, first = blockIdx.y * EACH;
    if (row >= p.rows) return;
    float factors[4];
#pragma unroll
    for (int r = 0; r < 4; r++) factors[r] = row + r < p.rows ? half_to_float(p.scales[row + r]) * p.step : 0;
    const bool at_once = p.type != 2 && row + 4 <= p.rows && ((size_t)p.y | p.y_stride * 2) % 8 == 0;
#pragma unroll
    for (int token = first; token < first + EACH; token++) {
        if (token >= p.tokens) break;
        const int4 four = *(const int4 *)(p.sums + (size_t)token * p.sum_stride + row);
        const float token_step = p.token_steps[token];
        const int sums[4] = {four.x, four.y, four.z, four.w};
        float results[4];
#pragma unroll
        for (int r = 0; r < 4; r++) results[r] = sums[r] * token_step * factors[r];
        const size_t at = token * p.y_stride + row;
        if (at_once) {
            u16 bits[4];
#pragma unroll
            for (int r = 0; r < 4; r++) bits[r] = p.type == 1 ? to_bfloat16(results[r]) : to_half(results[r]);
            *(uint2 *)((u16 *)p.y + at) = make_uint2(bits[0] | (u32)bits[1] << 16, bits[2] | (u32)bits[3] << 16);
        } else {
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (row + r < p.rows) store(p.y, at + r, p.type, results[r]);
        }
    }
}
