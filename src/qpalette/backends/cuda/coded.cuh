// A stream of a cache of codes, as docs/cache.md defines its bytes: what kernels that write and read it share.

constexpr int PAGE = 64, SCALE_STEPS = 12, SCALE_ONE = 160;  // as in kvcache

// Fields of an index, widest first: 8, 4, 2 and 1 bits, as BITS has them.
__host__ __device__ constexpr int plane_width(int bits, int plane) {
    for (int width = 8; width; width /= 2)
        if (bits & width && plane-- == 0) return width;
    return 0;
}

__host__ __device__ constexpr int plane_count(int bits) { return (bits >> 3 & 1) + (bits >> 2 & 1) + (bits >> 1 & 1) + (bits & 1); }

__host__ __device__ constexpr int plane_shift(int bits, int plane) {
    int shift = 0;
    for (int i = 0; i < plane; i++) shift += plane_width(bits, i);
    return shift;
}

// Where a plane begins in a vector of `units` indexes; that of the plane after the last: bytes of a vector.
__host__ __device__ constexpr int plane_start(int bits, int units, int plane) {
    int start = 0;
    for (int i = 0; i < plane; i++) start += (units * plane_width(bits, i) + 7) / 8;
    return start;
}

// Vectors of DIM numbers, WIDTH of them to an index of BITS.
template <int DIM_, int WIDTH_, int BITS_>
struct Format {
    static constexpr int DIM = DIM_, WIDTH = WIDTH_, BITS = BITS_, UNITS = DIM / WIDTH, PLANES = plane_count(BITS);
    static constexpr int CODE_BYTES = plane_start(BITS, UNITS, PLANES), PAGE_BYTES = PAGE * (CODE_BYTES + 1);
};

__device__ __forceinline__ float scale_of(int byte) {
    return byte ? exp2f((byte - SCALE_ONE) / (float)SCALE_STEPS) : 0;
}

__device__ __forceinline__ void fetch(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// All threads ask for a constant that is read later, into the second cache.
__device__ __forceinline__ void fetch_all(const void *from, int bytes) {
    for (int at = threadIdx.x * 128; at < bytes; at += blockDim.x * 128) fetch((const u8 *)from + at);
}

// out[row][i] = sum over j of in[row][j] matrix[j][i], by TEAM threads, for matrices of SIZE x SIZE and vectors in shared
// memory; `sums` has room for COUNT * max(TEAM, SIZE) numbers. The matrix may be loaded ahead: it is part of the model.
template <int SIZE, int TEAM, int COUNT>
struct Transform {
    static constexpr int SLICES = TEAM / SIZE, EACH = ((SIZE + SLICES - 1) / SLICES + 3) / 4 * 4;  // inputs are read in fours
    static constexpr int HELD = EACH <= 64 ? EACH : 32;  // at once, so that their loads take the time of one
    float held[HELD];

    __device__ __forceinline__ void load(const float *matrix, int first) {
        const int i = threadIdx.x % SIZE, slice = threadIdx.x / SIZE;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int j = slice * EACH + first + k;
            held[k] = slice < SLICES && first + k < EACH && j < SIZE ? matrix[j * SIZE + i] : 0;
        }
    }

    // After `load(matrix, 0)`, by all threads; `in` is [COUNT][SIZE], at a multiple of 16 bytes.
    __device__ __forceinline__ void apply(const float *matrix, const float *in, float *sums, float *out) {
        static_assert(SLICES >= 1, "fewer threads than numbers");
        const int i = threadIdx.x % SIZE, slice = threadIdx.x / SIZE;
        float sum[COUNT] = {};
#pragma unroll 1
        for (int first = 0; first < EACH; first += HELD) {
            if (first) load(matrix, first);
#pragma unroll
            for (int k = 0; k < HELD; k += 4) {
                const int j = min(slice * EACH + first + k, SIZE - 4);
#pragma unroll
                for (int row = 0; row < COUNT; row++) {
                    const float4 x = *(const float4 *)(in + row * SIZE + j);
                    sum[row] += held[k] * x.x + held[k + 1] * x.y + held[k + 2] * x.z + held[k + 3] * x.w;
                }
            }
        }
        if (slice < SLICES)
#pragma unroll
            for (int row = 0; row < COUNT; row++) sums[(row * SLICES + slice) * SIZE + i] = sum[row];
        __syncthreads();
        for (int at = threadIdx.x; at < COUNT * SIZE; at += TEAM) {
            const int row = at / SIZE, own = at % SIZE;
            float total = 0;
#pragma unroll
            for (int s = 0; s < SLICES; s++) total += sums[(row * SLICES + s) * SIZE + own];
            out[at] = total;
        }
        __syncthreads();
    }
};
