// Many new tokens of a layer become codes: as coded_write.cu does it, sixteen of a head to a warp, in one launch.
//
// Tokens are the rows of matrix instructions. What a lane has of a result, of two tokens two neighbours of each eight
// coordinates, is what the next product wants of it if inputs are numbered in that order: coordinates, what errors add to
// them, and errors stay with their lane. Products are float32's: a number is the sum of two of tf32, whose products are
// exact, and what is left out of it is below a rounding. Tokens of a block share a head's matrices, eight rows of which
// lie in shared memory while those before are multiplied.
//
// Compile-time constants: those of coded_write.cuh.

constexpr int ROWS = 16, TOKENS = THREADS / 32 * ROWS;  // of a warp, of a block
constexpr int FAR = 256;  // beyond it several points may be equally near, as differences are rounded

// In shared memory: points (of one number: and where the next begin), vectors, slabs, and what is read in vain behind them.
// From line to line it is so far that lanes meet no bank twice.
template <class F>
struct Room {
    static constexpr int BLOCKS = F::DIM / BLOCK, POINTS = (1 << F::BITS) * (F::WIDTH > 1 ? F::WIDTH : 2);
    static constexpr int VECTOR = F::DIM + 8, LINE = F::DIM + 2, SLAB = BLOCK / 2 * LINE;
};

struct Split {
    u32 high, low;
    __device__ __forceinline__ Split(float value) {
        high = (__float_as_uint(value) + 0x1000) & 0xffffe000;
        low = __float_as_uint(value - __uint_as_float(high)) & 0xffffe000;
    }
};

// sum += a b of a 16 x 8 tile of tf32 and eight columns: m16n8k8.
__device__ __forceinline__ void multiply_split(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Eight inputs of sixteen tokens: of a lane's two tokens its two.
struct Inputs {
    u32 high[4], low[4];

    __device__ __forceinline__ Inputs(const float (&numbers)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Split part(numbers[i % 2 * 2 + i / 2]);
            high[i] = part.high, low[i] = part.low;
        }
    }

    // What they add to eight outputs, whose part of the slab begins at `near`.
    template <int LINE>
    __device__ __forceinline__ void multiply(float (&sum)[4], const uint4 *near) const {
        const int lane = threadIdx.x % 32;
        const uint4 both = near[lane % 4 * LINE + lane / 4];
        multiply_split(sum, low, both.x, both.y);
        multiply_split(sum, high, both.z, both.w);
        multiply_split(sum, high, both.x, both.y);
    }
};

// Eight rows of a matrix at a time, of pairs of rows: in shared memory, split, while the next are on their way.
template <class F>
struct Slabs {
    static constexpr u32 ITEMS = BLOCK / 2 * F::DIM, EACH = (ITEMS + THREADS - 1) / THREADS;
    uint4 *near;
    int start;
    float coming[EACH][2];

    static __device__ __forceinline__ bool has(u32 i) { return ITEMS % THREADS == 0 || i * THREADS + threadIdx.x < ITEMS; }
    static __device__ __forceinline__ u32 pair_of(u32 i) {
        return THREADS % F::DIM ? (i * THREADS + threadIdx.x) / F::DIM : i * (THREADS / F::DIM) + threadIdx.x / F::DIM;
    }
    static __device__ __forceinline__ u32 column_of(u32 i) { return (THREADS % F::DIM ? i * THREADS + threadIdx.x : threadIdx.x) % F::DIM; }

    __device__ __forceinline__ void ask(const float *rows) {
#pragma unroll
        for (u32 i = 0; i < EACH; i++)
            if (has(i))
#pragma unroll
                for (u32 k = 0; k < 2; k++) coming[i][k] = rows[(pair_of(i) * 2 + k) * F::DIM + column_of(i)];
    }

    // By all threads: what was asked for; `next` are the rows to come, if there are any.
    __device__ __forceinline__ const uint4 *take(const float *next) {
        const uint4 *now = near + start;
#pragma unroll
        for (u32 i = 0; i < EACH; i++)
            if (has(i)) {
                const Split first(coming[i][0]), second(coming[i][1]);
                near[start + pair_of(i) * Room<F>::LINE + column_of(i)] = {first.high, second.high, first.low, second.low};
            }
        __syncthreads();
        start = Room<F>::SLAB - start;
        if (next) ask(next);
        return now;
    }
};

// Which points are nearest to a lane's numbers, the first of equals, 0 for what is no number.
template <class F>
struct Nearest {
    static constexpr int COUNT = 1 << F::BITS, WIDTH = F::WIDTH;

    template <int TARGETS>
    static __device__ __forceinline__ void search(const float *points, const float (&wanted)[TARGETS * WIDTH], int (&where)[TARGETS]) {
        float lowest[TARGETS];
#pragma unroll
        for (int target = 0; target < TARGETS; target++) lowest[target] = __int_as_float(0x7f800000), where[target] = 0;
#pragma unroll 4
        for (int point = 0; point < COUNT; point++)
#pragma unroll
            for (int target = 0; target < TARGETS; target++) {
                float distance = 0;
#pragma unroll
                for (int c = 0; c < WIDTH; c++) {
                    const float apart = __fsub_rn(wanted[target * WIDTH + c], points[point * WIDTH + c]);
                    distance = c ? __fadd_rn(distance, __fmul_rn(apart, apart)) : __fmul_rn(apart, apart);
                }
                if (distance < lowest[target]) lowest[target] = distance, where[target] = point;
            }
    }

    // Of two tokens two neighbours each: four points, two or, with the neighbouring lane, a token each.
    static __device__ __forceinline__ void find(const float *points, const float (&wanted)[4], int (&where)[4]) {
        if constexpr (WIDTH == 1) {
            const float largest = fmaxf(fmaxf(fabsf(wanted[0]), fabsf(wanted[1])), fmaxf(fabsf(wanted[2]), fabsf(wanted[3])));
            if (largest > FAR) return search<4>(points, wanted, where);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                where[i] = 0;
#pragma unroll
                for (int step = COUNT / 2; step; step /= 2)
                    if (wanted[i] >= points[COUNT + where[i] + step - 1]) where[i] += step;
            }
        } else if constexpr (WIDTH == 2) {
            int found[2];
            search<2>(points, wanted, found);
            where[0] = where[1] = found[0], where[2] = where[3] = found[1];
        } else {
            const bool odd = threadIdx.x % 2;
            const float first = __shfl_xor_sync(~0u, odd ? wanted[0] : wanted[2], 1), second = __shfl_xor_sync(~0u, odd ? wanted[1] : wanted[3], 1);
            const float whole[4] = {odd ? first : wanted[0], odd ? second : wanted[1], odd ? wanted[2] : first, odd ? wanted[3] : second};
            int found[1];
            search<1>(points, whole, found);
            const int other = __shfl_xor_sync(~0u, found[0], 1);
            where[0] = where[1] = odd ? other : found[0], where[2] = where[3] = odd ? found[0] : other;
        }
    }
};

// What a lane has of its tokens: of two, `group` and eight on, the numbers `pair` and `pair` + 1 of each block.
struct Place {
    const int group, pair;
    __device__ __forceinline__ Place() : group(threadIdx.x % 32 / 4), pair(threadIdx.x % 4 * 2) {}
};

template <class F>
__device__ __forceinline__ void read_pairs(const float *vectors, int block, float (&numbers)[4]) {
    const Place place;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float2 both = *(const float2 *)(vectors + (place.group + half * 8) * Room<F>::VECTOR + block * BLOCK + place.pair);
        numbers[half * 2] = both.x, numbers[half * 2 + 1] = both.y;
    }
}

__device__ __forceinline__ float sum_of_token(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

// x - m of a warp's tokens, of which `rows` are there.
template <class F>
__device__ __forceinline__ void centre(const u16 *x, long long stride, int rows, const float *mean, float *vectors) {
#pragma unroll 4
    for (int at = 8 * (threadIdx.x % 32); at < ROWS * F::DIM; at += 8 * 32) {
        const int row = at / F::DIM, first = at % F::DIM;
        const uint4 bits = row < rows ? *(const uint4 *)(x + row * stride + first) : uint4{};
        const u32 pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u16 own = pairs[i / 2] >> i % 2 * 16;
            vectors[row * Room<F>::VECTOR + first + i] = load(&own, 0, TYPE) - mean[first + i];
        }
    }
    __syncwarp();
}

// A (x - m) of a warp's tokens, in the place of x - m, and its squares' sums; what is asked for next is `feedback`.
template <class F>
__device__ __forceinline__ void transform(Slabs<F> &slabs, const float *matrix, const float *feedback, float *vectors, float (&square)[2]) {
    constexpr int BLOCKS = Room<F>::BLOCKS, VECTOR = Room<F>::VECTOR, LINE = Room<F>::LINE;
    const Place place;
    float sums[BLOCKS][4] = {};
#pragma unroll 1
    for (int block = 0; block < BLOCKS; block++) {
        matrix += BLOCK * F::DIM;
        const uint4 *near = slabs.take(block + 1 < BLOCKS ? matrix : feedback);
        float numbers[4];
        read_pairs<F>(vectors, block, numbers);
        const Inputs inputs(numbers);
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) inputs.multiply<LINE>(sums[n], near + n * BLOCK);
    }
    __syncwarp();
    square[0] = square[1] = 0;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 y = {sums[n][half * 2], sums[n][half * 2 + 1]};
            *(float2 *)(vectors + (place.group + half * 8) * VECTOR + n * BLOCK + place.pair) = y;
            square[half] += y.x * y.x + y.y * y.y;
        }
#pragma unroll
    for (int half = 0; half < 2; half++) square[half] = sum_of_token(square[half]);
}

// A warp codes its tokens' y, whose squares' sums are given; where they are, each token's indexes follow. byte: of a lane's
// two tokens the scales. SHAPED: there is feedback; carried[n] is what errors add to the n-th block from the one that is
// coded on.
template <class F, bool UNBIASED, bool SHAPED>
__device__ __forceinline__ void code(Slabs<F> &slabs, const float *feedback, const float *gain, const float *points, float *vectors, const float (&square)[2], int (&byte)[2]) {
    constexpr int BLOCKS = Room<F>::BLOCKS, VECTOR = Room<F>::VECTOR, LINE = Room<F>::LINE, TOGETHER = 4;
    const Place place;
    float scale[2] = {1, 1}, divisor[2], reciprocal[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float root = sqrtf(square[half] / F::DIM);
        divisor[half] = isnan(root) ? root : fmaxf(root, 1.17549435e-38f);
        if (SHAPED) {
            byte[half] = byte_of_scale(root * *gain);
            scale[half] = scale_of(byte[half]), divisor[half] = scale[half] == 0 ? 1 : scale[half];
        }
        reciprocal[half] = __frcp_rn(divisor[half]);
    }
    float carried[BLOCKS][4] = {}, cross[2] = {}, of_levels[2] = {};
#pragma unroll 1
    for (int block = 0; block < BLOCKS; block++) {
        if (SHAPED) feedback += BLOCK * F::DIM;
        const uint4 *near = SHAPED ? slabs.take(block + 1 < BLOCKS ? feedback : nullptr) : nullptr;
        float number[4], wanted[4], error[4];
        int where[4];
        read_pairs<F>(vectors, block, number);
#pragma unroll
        for (int i = 0; i < 4; i++) wanted[i] = quotient(SHAPED ? number[i] + carried[0][i] : number[i], divisor[i / 2], reciprocal[i / 2]);
        Nearest<F>::find(points, wanted, where);
        __syncwarp();  // indexes lie where numbers of this block, or of those before, were
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int own = place.pair + i % 2;
            const float level = points[where[i] * F::WIDTH + own % F::WIDTH];
            cross[i / 2] += number[i] * level, of_levels[i / 2] += level * level;
            error[i] = number[i] - level * scale[i / 2];
            u8 *index = (u8 *)(vectors + (place.group + i / 2 * 8) * VECTOR);
            if (own % F::WIDTH == 0) index[(block * BLOCK + own) / F::WIDTH] = where[i];
        }
        if (!SHAPED) continue;
        const Inputs inputs(error);
#pragma unroll
        for (int n = 1; n < BLOCKS; n += TOGETHER)
            if (block + n < BLOCKS)
#pragma unroll
                for (int k = n; k < n + TOGETHER && k < BLOCKS; k++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) carried[k - 1][i] = carried[k][i];
                    inputs.multiply<LINE>(carried[k - 1], near + (block + k) * BLOCK);
                }
    }
    if (SHAPED) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float all = sum_of_token(cross[half]), levels = sum_of_token(of_levels[half]);
        byte[half] = byte_of_scale(UNBIASED ? square[half] / all : all / levels);
    }
}

// Which tokens a warp has. Asked for again where they are stored: registers are short in between.
struct Tile {
    int item, head, batch, first;
    __device__ __forceinline__ Tile(const Problem &problem) {
        u32 block;
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
        const u32 tiles = (problem.count + TOKENS - 1) / TOKENS;
        item = block / tiles, first = block % tiles * TOKENS + threadIdx.x / 32 * ROWS;
        head = item % problem.heads, batch = item / problem.heads;
    }
};

// Where they go.
struct Target {
    u8 *pages;  // of their head
    long long first_token;
    int rows, length;

    __device__ __forceinline__ bool has(int row) const {
        return row < rows && first_token + row >= 0 && first_token + row < length;
    }

    template <class F>
    __device__ __forceinline__ u8 *page_of(int row) const {
        return pages + (size_t)((u32)(first_token + row) / PAGE) * F::PAGE_BYTES;
    }

    __device__ __forceinline__ int place_of(int row) const { return (u32)(first_token + row) % PAGE; }
};

// The indexes of a warp's tokens, a lane a byte.
template <class F>
__device__ __forceinline__ void store_rows(const Target &target, const float *vectors) {
#pragma unroll
    for (int plane = 0; plane < F::PLANES; plane++) {
        const int width = plane_width(F::BITS, plane), shift = plane_shift(F::BITS, plane), each = 8 / width;
        const int start = plane_start(F::BITS, F::UNITS, plane), bytes = plane_start(F::BITS, F::UNITS, plane + 1) - start;
        for (int at = threadIdx.x % 32; at < ROWS * bytes; at += 32) {
            const int row = at / bytes, own = at % bytes;
            const u8 *index = (const u8 *)(vectors + row * Room<F>::VECTOR) + own * each;
            u32 byte = 0;
#pragma unroll
            for (int k = 0; k < each; k++)
                if (F::UNITS % each == 0 || own * each + k < F::UNITS) byte |= (index[k] >> shift & ((1 << width) - 1)) << k * width;
            if (target.has(row)) target.page_of<F>(row)[target.place_of(row) * F::CODE_BYTES + start + own] = byte;
        }
    }
}

template <class F>
__device__ __forceinline__ void store_tile(const Problem &problem, const Stream &stream, const float *vectors, const int (&byte)[2]) {
    const Tile tile(problem);
    const Target target{stream.pages + (size_t)tile.item * stream.page_count * F::PAGE_BYTES, problem.tokens[0] + tile.first, problem.count - tile.first, problem.length};
    __syncwarp();
    store_rows<F>(target, vectors);
    const Place place;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = place.group + half * 8;
        if (place.pair == 0 && target.has(row)) target.page_of<F>(row)[PAGE * F::CODE_BYTES + target.place_of(row)] = byte[half];
    }
    const bool has_sinks = target.first_token < problem.starts[tile.batch] + problem.sink_count;
    if (has_sinks || tile.first + ROWS > problem.count - problem.window)
        for (int row = 0; row < ROWS; row++)
            if (target.has(row))
                keep_exact(problem, stream, F::DIM, tile.batch, tile.item, tile.head, tile.first + row, target.first_token + row);
}

template <class F, bool UNBIASED>
__device__ __forceinline__ void write(const Problem &problem, const Stream &stream) {
    extern __shared__ __align__(16) float shared[];
    const Tile tile(problem);
    const size_t own = stream.is_shared ? 0 : tile.head;
    const float *matrix = stream.matrix + own * F::DIM * F::DIM;
    const float *feedback = stream.feedback ? stream.feedback + (size_t)tile.head * F::DIM * F::DIM : nullptr;
    float *points = shared, *all = points + Room<F>::POINTS, *vectors = all + threadIdx.x / 32 * ROWS * Room<F>::VECTOR;
    Slabs<F> slabs{(uint4 *)(all + TOKENS * Room<F>::VECTOR), 0};
    slabs.ask(matrix);
    for (int i = threadIdx.x; i < Room<F>::POINTS; i += THREADS) points[i] = stream.points[i];
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u16 *from = stream.vectors + tile.batch * stream.vector_batch + tile.head * stream.vector_head + tile.first * stream.vector_token;
    centre<F>(from, stream.vector_token, problem.count - tile.first, stream.mean + own * F::DIM, vectors);
    float square[2];
    int byte[2];
    transform<F>(slabs, matrix, feedback, vectors, square);
    if (feedback) code<F, UNBIASED, true>(slabs, feedback, stream.gain + tile.head, points, vectors, square, byte);
    else code<F, UNBIASED, false>(slabs, nullptr, nullptr, points, vectors, square, byte);
    store_tile<F>(problem, stream, vectors, byte);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) cache_write_many(const __grid_constant__ Problem problem) {
    if (blockIdx.y == 0) write<Format<KEY_DIM, KEY_WIDTH, KEY_BITS>, KEY_UNBIASED>(problem, problem.streams[0]);
    else write<Format<VALUE_DIM, VALUE_WIDTH, VALUE_BITS>, VALUE_UNBIASED>(problem, problem.streams[1]);
}
