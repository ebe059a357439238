// Codes of a stream as numbers, in the stream's coordinates: float32 [batch * heads][count][KEY_DIM] of `count` tokens from
// `first` on. Compile-time constants: KEY_DIM, KEY_WIDTH, KEY_BITS. A thread has an index.

typedef Format<KEY_DIM, KEY_WIDTH, KEY_BITS> F;

struct Problem {
    const u8 *pages;
    const float *points;
    float *out;
    int page_count, first, count;
};

extern "C" __global__ void __launch_bounds__(256) cache_read(const __grid_constant__ Problem problem) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int at = blockIdx.x * 256 + threadIdx.x;
    if (at >= problem.count * F::UNITS) return;
    const int unit = at % F::UNITS, offset = at / F::UNITS, token = problem.first + offset;
    const u8 *page = problem.pages + ((size_t)blockIdx.y * problem.page_count + token / PAGE) * F::PAGE_BYTES;
    const u8 *codes = page + token % PAGE * F::CODE_BYTES;
    int index = 0;
#pragma unroll
    for (int plane = 0; plane < F::PLANES; plane++) {
        const int width = plane_width(F::BITS, plane), bit = unit * width;
        index |= (codes[plane_start(F::BITS, F::UNITS, plane) + bit / 8] >> bit % 8 & ((1 << width) - 1)) << plane_shift(F::BITS, plane);
    }
    const float scale = scale_of(page[PAGE * F::CODE_BYTES + token % PAGE]);
#pragma unroll
    for (int c = 0; c < F::WIDTH; c++)
        problem.out[((size_t)blockIdx.y * problem.count + offset) * F::DIM + unit * F::WIDTH + c] = problem.points[index * F::WIDTH + c] * scale;
}
