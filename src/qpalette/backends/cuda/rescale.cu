// y *= what a token was divided by, in place, float16: what a library's matrix product of x' and W lacks, for the few tokens
// that were divided at all (rotate.cu). A block has a token.
//
// Compile-time constants: THREADS, MOST_SEGMENTS.

struct Outputs {
    u16 *y[MOST_SEGMENTS];  // [tokens][y_stride]
    int y_stride[MOST_SEGMENTS], rows[MOST_SEGMENTS];
    const float *x_scales;  // [tokens]
    int count;
};

extern "C" __global__ void __launch_bounds__(THREADS) rescale(const __grid_constant__ Outputs outputs) {
    const float x_scale = outputs.x_scales[blockIdx.x];
    if (x_scale == 1) return;
    for (int i = 0; i < outputs.count; i++) {
        u16 *y = outputs.y[i] + (size_t)blockIdx.x * outputs.y_stride[i];
        for (int row = threadIdx.x; row < outputs.rows[i]; row += THREADS) y[row] = to_half(half_to_float(y[row]) * x_scale);
    }
}
