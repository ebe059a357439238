// New tokens of a layer become codes: keys and values, transformed, coded, stored, in one launch (docs/cache.md).
//
// A block has a vector, and all its threads multiply it by its matrix; with TURNED that is done, and every warp has
// vectors of its own. A warp codes eight coordinates at a time: all lanes compare with the points, and the errors are
// fed back to what is behind, by rows of the matrix that were loaded while the eight before were coded. That is the
// launch's longest chain; points are in shared memory and the matrix in the second cache before the kernel ahead has ended.
//
// Compile-time constants: of the first and second stream KEY_ and VALUE_ DIM, WIDTH, BITS, UNBIASED; TYPE (of vectors,
// sinks and ring: 0 float16, 1 bfloat16), TURNED, THREADS.

constexpr int BLOCK = 8;  // as kvcache.vectors has it
constexpr int WARPS = THREADS / 32;

struct Stream {
    const u16 *vectors;               // [batch][heads][count][DIM]
    long long vector_batch, vector_head, vector_token;
    const float *turned;              // [batch][heads][count][DIM], contiguous: A (x - m), if TURNED
    const float *matrix, *mean;       // [heads or 1] of A^T and of m
    const float *feedback, *gain;     // [heads] of the transpose [DIM][DIM]; null: errors stay where they are
    const float *points;              // [2^BITS][WIDTH]
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

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

__device__ __forceinline__ int byte_of_scale(float scale) {
    if (!isfinite(scale) || !(scale > 0)) return 0;
    return (int)fminf(fmaxf(rintf(log2f(scale) * SCALE_STEPS) + SCALE_ONE, 0.f), 255.f);
}

// Which point is nearest to `wanted`, the first of equals, for the unit that this lane and its neighbours have.
template <class F>
__device__ __forceinline__ int nearest(const float *points, const float *wanted) {
    constexpr int LANES = 32 * F::WIDTH / BLOCK;
    const int lane = threadIdx.x % 32, own = lane % LANES;
    float target[F::WIDTH];
#pragma unroll
    for (int c = 0; c < F::WIDTH; c++) target[c] = wanted[lane / LANES * F::WIDTH + c];
    float lowest = __int_as_float(0x7f800000);
    int where = own;  // also of what is no number
#pragma unroll 4
    for (int point = own; point < 1 << F::BITS; point += LANES) {
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
    return where;
}

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

// What the errors of BLOCK coordinates add to those of this lane.
template <class F>
struct Feedback {
    static constexpr int OWN = (F::DIM + 31) / 32;
    float weight[BLOCK][OWN];

    __device__ __forceinline__ void load(const float *matrix, int start) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < BLOCK; j++)
#pragma unroll
            for (int i = 0; i < OWN; i++) weight[j][i] = i * 32 + lane < F::DIM ? matrix[(start + j) * F::DIM + i * 32 + lane] : 0;
    }
};

// A warp codes y, in shared memory like `points`, `index` and `errors`; 32 lanes have what is carried to later coordinates.
template <class F, bool UNBIASED>
__device__ __forceinline__ void code(const float *feedback, const float *gain, const float *points, const float *y, u8 *index, float *errors, u8 *codes, u8 *scale_byte) {
    constexpr int OWN = Feedback<F>::OWN;
    const int lane = threadIdx.x % 32;
    Feedback<F> next;
    if (feedback) next.load(feedback, 0);
    float square = 0;
    for (int i = lane; i < F::DIM; i += 32) square += y[i] * y[i];
    square = sum_of_warp(square);
    const float root = sqrtf(square / F::DIM);
    int byte = 0;
    float scale = 1, divisor = isnan(root) ? root : fmaxf(root, 1.17549435e-38f);
    if (feedback) {
        byte = byte_of_scale(root * *gain);
        scale = scale_of(byte), divisor = scale == 0 ? 1 : scale;
    }
    float carried[OWN] = {}, cross = 0, of_levels = 0;
#pragma unroll 1
    for (int start = 0; start < F::DIM; start += BLOCK) {
        const Feedback<F> own = next;
        if (feedback && start + BLOCK < F::DIM) next.load(feedback, start + BLOCK);
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (const int place = i * 32 + lane - start; place >= 0 && place < BLOCK) errors[place] = (y[start + place] + carried[i]) / divisor;
        __syncwarp();
        const int where = nearest<F>(points, errors);
        constexpr int LANES = 32 * F::WIDTH / BLOCK;
        __syncwarp();
        if (lane % LANES < F::WIDTH) {
            const int place = lane / LANES * F::WIDTH + lane % LANES;
            const float level = points[where * F::WIDTH + lane % LANES], number = y[start + place];
            errors[place] = number - level * scale;
            cross += number * level, of_levels += level * level;
        }
        if (lane % LANES == 0) index[start / F::WIDTH + lane / LANES] = where;
        __syncwarp();
        if (feedback)
#pragma unroll
            for (int j = 0; j < BLOCK; j++)
#pragma unroll
                for (int i = 0; i < OWN; i++) carried[i] += own.weight[j][i] * errors[j];
        __syncwarp();
    }
    if (!feedback) {
        cross = sum_of_warp(cross), of_levels = sum_of_warp(of_levels);
        byte = byte_of_scale(UNBIASED ? square / cross : cross / of_levels);
    }
    store<F>(index, codes);
    if (lane == 0) *scale_byte = byte;
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

template <class F, bool UNBIASED>
__device__ __forceinline__ void write(const Problem &problem, const Stream &stream) {
    extern __shared__ __align__(16) float shared[];
    __shared__ __align__(16) float points[(1 << F::BITS) * F::WIDTH];
    __shared__ u8 indexes[TURNED ? WARPS : 1][F::UNITS];
    __shared__ float errors[TURNED ? WARPS : 1][BLOCK];
    const int warp = threadIdx.x / 32, vectors = problem.batch * problem.heads * problem.count;
    float *y = shared + (TURNED ? warp * F::DIM : 0), *x = shared + F::DIM, *sums = x + F::DIM;
    Transform<F::DIM, THREADS, 1> transform;
    const int first = TURNED ? blockIdx.x * WARPS + warp : blockIdx.x, step = TURNED ? gridDim.x * WARPS : gridDim.x;
    const int first_head = first / problem.count % problem.heads;
    if (!TURNED) {
        transform.load(stream.matrix + (stream.is_shared ? 0 : (size_t)first_head * F::DIM * F::DIM), 0);
        if (stream.feedback) fetch_all(stream.feedback + (size_t)first_head * F::DIM * F::DIM, F::DIM * F::DIM * 4);
    }
    for (int i = threadIdx.x; i < (1 << F::BITS) * F::WIDTH; i += THREADS) points[i] = stream.points[i];
    __syncthreads();
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int vector = first; vector < vectors; vector += step) {  // without TURNED there is one
        const int item = vector / problem.count, offset = vector % problem.count, head = item % problem.heads, batch = item / problem.heads;
        const long long token = problem.tokens[0] + offset;
        if (token < 0 || token >= problem.length) continue;  // there is no room
        if (TURNED) {
            for (int i = threadIdx.x % 32; i < F::DIM; i += 32) y[i] = stream.turned[(size_t)vector * F::DIM + i];
            __syncwarp();
        } else {
            const u16 *from = stream.vectors + batch * stream.vector_batch + head * stream.vector_head + offset * stream.vector_token;
            const size_t own = stream.is_shared ? 0 : head;
            for (int i = threadIdx.x; i < F::DIM; i += THREADS) x[i] = load(from, i, TYPE) - stream.mean[own * F::DIM + i];
            __syncthreads();
            transform.apply(stream.matrix + own * F::DIM * F::DIM, x, sums, y);
        }
        if (TURNED || warp == 1) keep_exact(problem, stream, F::DIM, batch, item, head, offset, token);
        if (TURNED || warp == 0) {
            u8 *page = stream.pages + ((size_t)item * stream.page_count + token / PAGE) * F::PAGE_BYTES;
            const int place = token % PAGE;
            const float *feedback = stream.feedback ? stream.feedback + (size_t)head * F::DIM * F::DIM : nullptr;
            code<F, UNBIASED>(feedback, stream.gain + head, points, y, indexes[TURNED ? warp : 0], errors[TURNED ? warp : 0], page + place * F::CODE_BYTES, page + PAGE * F::CODE_BYTES + place);
            __syncwarp();
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) cache_write(const __grid_constant__ Problem problem) {
    if (blockIdx.y == 0) write<Format<KEY_DIM, KEY_WIDTH, KEY_BITS>, KEY_UNBIASED>(problem, problem.streams[0]);
    else write<Format<VALUE_DIM, VALUE_WIDTH, VALUE_BITS>, VALUE_UNBIASED>(problem, problem.streams[1]);
}
