// What new tokens of a layer become when they are written, few or many: where they go, scales, bytes, exact tokens.
//
// Compile-time constants: of the first and second stream KEY_ and VALUE_ DIM, WIDTH, BITS, UNBIASED; TYPE (of vectors,
// sinks and ring: 0 float16, 1 bfloat16), THREADS.

constexpr int BLOCK = 8;  // as kvcache.vectors has it

struct Stream {
    const u16 *vectors;               // [batch][heads][count][DIM]
    long long vector_batch, vector_head, vector_token;
    const float *matrix, *mean;       // [heads or 1] of A^T and of m
    const float *feedback, *gain;     // [heads] of the transpose [DIM][DIM]; null: errors stay where they are
    const float *points;              // [2^BITS][WIDTH]; of one number: then borders
    u8 *pages;                        // [batch][heads][page_count] of PAGE_BYTES
    u16 *sinks, *ring;                // [batch][heads][sink_count or window][DIM]
    long long *ring_tokens;           // [window]
    int page_count, is_shared;        // is_shared: all heads have one transform
};

struct Problem {
    Stream streams[2];
    const long long *tokens, *starts;  // [1 or more], of which the first counts; [batch]
    int batch, heads, count, length, sink_count, window;
};

__device__ __forceinline__ int byte_of_scale(float scale) {
    if (!isfinite(scale) || !(scale > 0)) return 0;
    return (int)fminf(fmaxf(rintf(log2f(scale) * SCALE_STEPS) + SCALE_ONE, 0.f), 255.f);
}

// a / b, 1 / b known: three dependent instructions where a division has some ten.
__device__ __forceinline__ float quotient(float a, float b, float reciprocal) {
    const float near = __fmul_rn(a, reciprocal);
    return __fmaf_rn(__fmaf_rn(-b, near, a), reciprocal, near);
}

// What of a vector is kept as it is.
__device__ __forceinline__ void keep_exact(const Problem &problem, const Stream &stream, int dim, int batch, int item, int head, int offset, long long token) {
    const u16 *x = stream.vectors + batch * stream.vector_batch + head * stream.vector_head + offset * stream.vector_token;
    const long long place = token - problem.starts[batch];
    if (place >= 0 && place < problem.sink_count)
        for (int i = threadIdx.x % 32; i < dim; i += 32) stream.sinks[((size_t)item * problem.sink_count + place) * dim + i] = x[i];
    if (offset >= problem.count - problem.window) {
        const int ring = token % problem.window;
        for (int i = threadIdx.x % 32; i < dim; i += 32) stream.ring[((size_t)item * problem.window + ring) * dim + i] = x[i];
        if (item == 0 && threadIdx.x % 32 == 0) stream.ring_tokens[ring] = token;
    }
}
