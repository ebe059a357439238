// y = product * x_scale * row scale: what a library's matrix product of x' and W' lacks. A block has a part of a token.
//
// Compile-time constants: THREADS, EACH (elements of a thread).

extern "C" __global__ void __launch_bounds__(THREADS)
rescale(const u16 *product, long long product_stride, const float *x_scales, const u16 *scales, int rows, void *y,
        long long y_stride, int out_type) {
    const int token = blockIdx.x;
    const float x_scale = x_scales[token];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int row = (blockIdx.y * EACH + i) * THREADS + threadIdx.x;
        if (row < rows)
            store(y, token * y_stride + row, out_type, half_to_float(product[token * product_stride + row]) * x_scale * half_to_float(scales[row]));
    }
}
