// New tokens of a layer become codes: keys and values, transformed, coded, stored, in one launch (docs/cache.md).
//
// A block has a vector, and all its threads multiply it by its matrix. A warp codes eight coordinates at a time, and
// their errors are fed back to what is behind. That is the launch's longest chain, so that it stays in registers: what a
// block needs of the matrix is in shared memory before the kernel ahead has ended, and passes from lane to lane by
// shuffles alone. Of many tokens: coded_write_many.cu.
//
// Compile-time constants: those of coded_write.cuh, and NEAR_DIM (of a vector whose feedback fits in shared memory).

__device__ __forceinline__ void copy_ahead(float *near, const float *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(near)), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// Which point is nearest to `wanted`, the first of equals, 0 for what is no number. Few points are compared by the lane
// that has the coordinate; else lanes that stand for a unit of the block at lane `first` have some of them each.
template <class F>
struct Nearest {
    static constexpr int COUNT = 1 << F::BITS, LANES = 32 * F::WIDTH / BLOCK, GROUPS = 4;  // compared side by side
    static constexpr bool ALONE = F::WIDTH == 1 && COUNT <= 16;
    float held[ALONE ? COUNT : 1];

    __device__ __forceinline__ Nearest(const float *points) {
        if constexpr (ALONE)
#pragma unroll
            for (int i = 0; i < COUNT; i++) held[i] = points[i];
    }

    __device__ __forceinline__ int alone(float wanted) const {
        float lowest[GROUPS];
        int where[GROUPS];
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            lowest[group] = __int_as_float(0x7f800000), where[group] = 0;
#pragma unroll
            for (int k = 0; k < COUNT / GROUPS; k++) {
                const int point = group * (COUNT / GROUPS) + k;
                const float apart = __fsub_rn(wanted, held[point]), distance = __fmul_rn(apart, apart);
                if (distance < lowest[group]) lowest[group] = distance, where[group] = point;
            }
        }
#pragma unroll
        for (int group = 1; group < GROUPS; group++)
            if (lowest[group] < lowest[0]) lowest[0] = lowest[group], where[0] = where[group];
        return where[0];
    }

    __device__ __forceinline__ int together(const float *points, float wanted, int first) const {
        const int lane = threadIdx.x % 32, own = lane % LANES;
        float target[F::WIDTH];
#pragma unroll
        for (int c = 0; c < F::WIDTH; c++) target[c] = __shfl_sync(~0u, wanted, first + lane / LANES * F::WIDTH + c);
        float lowest = __int_as_float(0x7f800000);
        int where = own;
#pragma unroll 4
        for (int point = own; point < COUNT; point += LANES) {
            float distance = 0;
#pragma unroll
            for (int c = 0; c < F::WIDTH; c++) {
                const float apart = __fsub_rn(target[c], points[point * F::WIDTH + c]);
                distance = c ? __fadd_rn(distance, __fmul_rn(apart, apart)) : __fmul_rn(apart, apart);
            }
            if (distance < lowest) lowest = distance, where = point;
        }
#pragma unroll
        for (int step = LANES / 2; step; step /= 2) {
            const float other = __shfl_xor_sync(~0u, lowest, step);
            const int place = __shfl_xor_sync(~0u, where, step);
            if (other < lowest || (other == lowest && place < where)) lowest = other, where = place;
        }
        return __shfl_sync(~0u, where, lane % BLOCK / F::WIDTH * LANES);  // of the unit that this lane's coordinate is in
    }

    __device__ __forceinline__ int find(const float *points, float wanted, int first) const {
        if constexpr (ALONE) return alone(wanted);
        else return together(points, wanted, first);
    }
};

// What the errors of BLOCK coordinates add to those of this lane.
template <class F>
struct Feedback {
    static constexpr int OWN = (F::DIM + 31) / 32;
    static constexpr bool NEAR = F::DIM <= NEAR_DIM;  // the matrix is in shared memory as a whole
    float weight[BLOCK][OWN];

    // Of coordinates from 32 `from` on: those before are coded.
    __device__ __forceinline__ void load(const float *matrix, int start, int from) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < BLOCK; j++)
#pragma unroll
            for (int i = 0; i < OWN; i++)
                if (i >= from) weight[j][i] = i * 32 + lane < F::DIM ? matrix[(start + j) * F::DIM + i * 32 + lane] : 0;
    }

    // All threads ask for what is right of the diagonal blocks, in shared memory.
    static __device__ __forceinline__ void copy(const float *matrix, float *near) {
        for (int at = 4 * threadIdx.x; at < F::DIM * F::DIM; at += 4 * THREADS)
            if (at % F::DIM >= (at / F::DIM / BLOCK + 1) * BLOCK) copy_ahead(near + at, matrix + at);
    }
};

template <class F>
__device__ __forceinline__ void store(const u8 *index, u8 *codes) {
#pragma unroll
    for (int plane = 0; plane < F::PLANES; plane++) {
        const int width = plane_width(F::BITS, plane), shift = plane_shift(F::BITS, plane), each = 8 / width;
        u8 *out = codes + plane_start(F::BITS, F::UNITS, plane);
        for (int i = threadIdx.x % 32; i < (F::UNITS * width + 7) / 8; i += 32) {
            u32 byte = 0;
#pragma unroll
            for (int k = 0; k < each; k++)
                if (i * each + k < F::UNITS) byte |= (index[i * each + k] >> shift & ((1 << width) - 1)) << k * width;
            out[i] = byte;
        }
    }
}

// A warp codes y, in shared memory like `points` and `index`; a lane has every 32nd coordinate, and what errors carry to it.
template <class F, bool UNBIASED>
__device__ __forceinline__ void code(const float *feedback, const float *gain, const float *points, const float *y, u8 *index, u8 *codes, u8 *scale_byte) {
    constexpr int OWN = Feedback<F>::OWN;
    const int lane = threadIdx.x % 32;
    const Nearest<F> nearest(points);
    Feedback<F> own;
    float number[OWN], square = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        number[i] = i * 32 + lane < F::DIM ? y[i * 32 + lane] : 0;
        square += number[i] * number[i];
    }
    square = sum_of_warp(square);
    const float root = sqrtf(square / F::DIM);
    int byte = 0;
    float scale = 1, divisor = isnan(root) ? root : fmaxf(root, 1.17549435e-38f);
    if (feedback) {
        byte = byte_of_scale(root * *gain);
        scale = scale_of(byte), divisor = scale == 0 ? 1 : scale;
    }
    const float reciprocal = __frcp_rn(divisor);
    float carried[OWN] = {}, cross = 0, of_levels = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll 1
        for (int first = 0; first < (F::DIM - i * 32 < 32 ? F::DIM - i * 32 : 32); first += BLOCK) {
            const int start = i * 32 + first;
            if (feedback) own.load(feedback, start, i);
            const int where = nearest.find(points, quotient(number[i] + carried[i], divisor, reciprocal), first);
            const float level = points[where * F::WIDTH + lane % F::WIDTH], error = number[i] - level * scale;
            if (lane / BLOCK == first / BLOCK) {
                cross += number[i] * level, of_levels += level * level;
                if (lane % F::WIDTH == 0) index[(i * 32 + lane) / F::WIDTH] = where;
            }
            if (feedback)
#pragma unroll
                for (int j = 0; j < BLOCK; j++) {
                    const float made = __shfl_sync(~0u, error, first + j);
#pragma unroll
                    for (int k = i; k < OWN; k++) carried[k] += own.weight[j][k] * made;
                }
        }
    if (!feedback) {
        cross = sum_of_warp(cross), of_levels = sum_of_warp(of_levels);
        byte = byte_of_scale(UNBIASED ? square / cross : cross / of_levels);
    }
    __syncwarp();
    store<F>(index, codes);
    if (lane == 0) *scale_byte = byte;
}

template <class F, bool UNBIASED>
__device__ __forceinline__ void write(const Problem &problem, const Stream &stream) {
    extern __shared__ __align__(16) float shared[];
    __shared__ __align__(16) float points[(1 << F::BITS) * F::WIDTH];
    __shared__ u8 index[F::UNITS];
    float *y = shared, *x = y + F::DIM, *sums = x + F::DIM, *near = sums + THREADS;
    const int warp = threadIdx.x / 32, item = blockIdx.x / problem.count, offset = blockIdx.x % problem.count;
    const int head = item % problem.heads, batch = item / problem.heads;
    const size_t own = stream.is_shared ? 0 : head;
    const float *matrix = stream.matrix + own * F::DIM * F::DIM, *feedback = stream.feedback + (size_t)head * F::DIM * F::DIM;
    Transform<F::DIM, THREADS, 1> transform;
    transform.load(matrix, 0);
    if (stream.feedback && Feedback<F>::NEAR) Feedback<F>::copy(feedback, near);
    if (stream.feedback && !Feedback<F>::NEAR) fetch_all(feedback, F::DIM * F::DIM * 4);
    for (int i = threadIdx.x; i < (1 << F::BITS) * F::WIDTH; i += THREADS) points[i] = stream.points[i];
    __syncthreads();
    wait_for_previous_kernel();
    let_next_kernel_start();
    const long long token = problem.tokens[0] + offset;
    if (token < 0 || token >= problem.length) return;  // there is no room
    const u16 *from = stream.vectors + batch * stream.vector_batch + head * stream.vector_head + offset * stream.vector_token;
    for (int i = threadIdx.x; i < F::DIM; i += THREADS) x[i] = load(from, i, TYPE) - stream.mean[own * F::DIM + i];
    wait_for_copies();
    __syncthreads();
    transform.apply(matrix, x, sums, y);
    if (warp == 1) keep_exact(problem, stream, F::DIM, batch, item, head, offset, token);
    if (warp == 0) {
        u8 *page = stream.pages + ((size_t)item * stream.page_count + token / PAGE) * F::PAGE_BYTES;
        const int place = token % PAGE;
        const float *fed = !stream.feedback ? nullptr : Feedback<F>::NEAR ? near : feedback;
        code<F, UNBIASED>(fed, stream.gain + head, points, y, index, page + place * F::CODE_BYTES, page + PAGE * F::CODE_BYTES + place);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) cache_write(const __grid_constant__ Problem problem) {
    if (blockIdx.y == 0) write<Format<KEY_DIM, KEY_WIDTH, KEY_BITS>, KEY_UNBIASED>(problem, problem.streams[0]);
    else write<Format<VALUE_DIM, VALUE_WIDTH, VALUE_BITS>, VALUE_UNBIASED>(problem, problem.streams[1]);
}
