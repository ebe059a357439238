// Packed matrices decoded to float16 or bfloat16, row scales applied, or to int8 without them, for batches where a library's
// matrix product wins.
//
// A block has some row tiles of one segment, and its warps take turns at their chunks. A warp asks for the next chunk's bits
// as soon as the last tile of the present one is decoded. Columns lie in the order of a product's fragments (rotate.cu), as
// x' does then: so that a lane writes eight weights at once.
//
// Compile-time constants: THREADS, TABLE_BYTES, DECODERS (types), IN_INT8 (tables have bytes in the place of halves).

constexpr int WARPS = THREADS / 32;

extern __shared__ __align__(16) u8 table[];

#if IN_INT8

typedef uint2 Eight;  // weights: two tiles' neighbouring columns of one row

__device__ __forceinline__ Eight row_of(u32 a, u32 b, u32 c, u32 d, u16, bool) {
    return make_uint2(__byte_perm(a, b, 0x6420), __byte_perm(c, d, 0x6420));
}

#else

typedef uint4 Eight;

// Two float16 weights times the scale of their row, as float16.
__device__ __forceinline__ u32 scaled(u32 weights, u32 scales) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(weights), "r"(scales));
    return product;
}

// The same as bfloat16, rounded once.
__device__ __forceinline__ u32 scaled_bfloat16(u32 weights, float scale) {
    const float low = half_to_float(weights & 0xffff) * scale, high = half_to_float(weights >> 16) * scale;
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ Eight row_of(u32 a, u32 b, u32 c, u32 d, u16 scale, bool bfloat16) {
    if (bfloat16) {
        const float factor = half_to_float(scale);
        return make_uint4(scaled_bfloat16(a, factor), scaled_bfloat16(b, factor), scaled_bfloat16(c, factor), scaled_bfloat16(d, factor));
    }
    const u32 both = scale * 65537u;
    return make_uint4(scaled(a, both), scaled(b, both), scaled(c, both), scaled(d, both));
}

#endif

template <class D>
__device__ void unpack_segment(const Problem &problem, const Segment &segment) {
    const u32 lane = threadIdx.x % 32;
    const int row = (blockIdx.x - segment.first_block) * segment.rows_per_block;
    const int items = min(segment.rows_per_block, segment.row_tiles - row) * problem.chunks;
    const u8 *codes = segment.codes + (size_t)row * problem.chunks * D::CHUNK_BYTES;
    const size_t stride = problem.y_stride / 8;
    const bool bfloat16 = problem.out_type == 1;
    int item = threadIdx.x / 32;
    u32 words[D::WORDS];
    if (item < items) D::load(words, codes + (size_t)item * D::CHUNK_BYTES, lane);
    D::fill(table, segment.entries);
    __syncthreads();
    for (; item < items; item += WARPS) {
        const int first = (row + item / problem.chunks) * 16 + lane / 4, second = first + 8;
        const u16 first_scale = first < segment.rows ? segment.scales[first] : 0;
        const u16 second_scale = second < segment.rows ? segment.scales[second] : 0;
        Eight *to = (Eight *)problem.y + segment.out_offset / 8 + (size_t)first * stride + item % problem.chunks * (CHUNK * 2) + lane % 4;
        const u8 *next = codes + (size_t)(item + WARPS) * D::CHUNK_BYTES;
        const u32 wanted = item + WARPS < items;
#pragma unroll
        for (int tile = 0; tile < CHUNK; tile += 2, to += 4) {
            u32 a[4], b[4];
            D::decode(a, words, tile, lane, segment.hash_unit, table);
            D::decode(b, words, tile + 1, lane, segment.hash_unit, table);
#pragma unroll
            for (int part = 0; part < D::PARTS; part++)
                if (D::last_tile(part) / 2 == tile / 2) D::load_part(words, part, next, lane, wanted);
            if (first < segment.rows) to[0] = row_of(a[0], a[2], b[0], b[2], first_scale, bfloat16);
            if (second < segment.rows) to[8 * stride] = row_of(a[1], a[3], b[1], b[3], second_scale, bfloat16);
        }
    }
}

struct Unpack {
    template <class D>
    static __device__ __forceinline__ void run(const Problem &problem, const Segment &segment) { unpack_segment<D>(problem, segment); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) unpack(const __grid_constant__ Problem problem) { run_segment<Unpack>(problem); }
