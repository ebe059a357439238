// y = W' x' for packed matrices W' (M x K) that read the same x', batch 1 to 16: decode in registers, multiply by mma.
//
// A cluster of SPLIT blocks owns some 16-row tiles of one segment (matrix); its blocks share the columns. Inside a block
// the (row tile, chunk of columns) items of a round are one list, cut evenly over the warps: a warp walks along a row of
// chunks, keeps the next chunk's bits in flight, and leaves a partial sum where it crosses to another row tile. The sums
// are added in the order of the warps, then of the blocks: the same bits on every run.
//
// Nothing of the weights depends on the kernel before: table and first chunk are fetched before its end is waited for.
//
// Compile-time constants: THREADS, TABLE_BYTES, BATCH (columns of x': 1, 2, 4, 8 or 16), SPLIT, DECODERS (types).

constexpr int WARPS = THREADS / 32;
constexpr int MOST_SEGMENTS = 8;
constexpr int FRAGMENTS = BATCH > 8 ? 2 : 1;         // of eight columns
constexpr int COLUMNS = BATCH > 8 ? 8 : BATCH;       // of x' in each
constexpr int X_PAIR = 64 * BATCH;                   // bytes of x' for a pair of 16-column tiles
constexpr int X_CHUNK = CHUNK / 2 * X_PAIR;
constexpr int SUMS = 128 * FRAGMENTS;                // of a row tile: 16 rows by 8 columns, wanted or not
constexpr int WANTED = 16 * BATCH;                   // of them, the first

struct Segment {
    const u8 *codes;     // [row tiles][chunks][CHUNK_BYTES]
    const u32 *entries;  // the decoder's table
    const u16 *scales;   // [M] float16
    int row_tiles, rows;
    int rows_per_block;  // row tiles of a cluster
    int first_cluster;   // that works on this segment
    int out_offset;      // of its first output
    int decoder;
    u32 hash_unit;       // see Decoder::decode
};

struct Problem {
    Segment segments[MOST_SEGMENTS];
    const u8 *x;            // [chunks][8 pairs of tiles][fragment][column][4 lanes][8 halves]
    const float *x_scales;  // [BATCH] what a column was divided by
    void *y;                // [batch][y_stride]
    int segment_count, chunks, batch, y_stride;
    int out_type;           // 0 float16, 1 bfloat16, 2 float32
};

extern __shared__ __align__(16) u8 shared[];  // table, then sums [WARPS][2][SUMS], then this block's [WARPS][WANTED]

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ u32 block_of_cluster() { return SPLIT == 1 ? 0 : blockIdx.x % SPLIT; }

__device__ __forceinline__ void synchronize_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A float in the shared memory of another block of the cluster, at the place of `mine` in this one's.
__device__ __forceinline__ float read_peer(const float *mine, u32 block) {
    float value = 0;
#if __CUDA_ARCH__ >= 900
    u32 address = (u32)__cvta_generic_to_shared(mine), there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
    return value;
}

__device__ __forceinline__ void multiply_tile(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void store(const Problem &problem, int column, int row, float value) {
    const size_t at = (size_t)column * problem.y_stride + row;
    if (problem.out_type == 2) ((float *)problem.y)[at] = value;
    else if (problem.out_type == 1) {
        u16 bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        ((u16 *)problem.y)[at] = bits;
    } else {
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        ((u16 *)problem.y)[at] = bits;
    }
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// This warp's share of a round: `items` (row tile, chunk) pairs in all, `width` chunks to a row tile.
struct Share {
    int begin, end;
    __device__ Share(int items, int warp) : begin(items * warp / WARPS), end(items * (warp + 1) / WARPS) {}
};

// Sums of the row tiles of a round, from the warps' partial ones, in the order of the warps.
__device__ __forceinline__ float sum_of_warps(const float *partial, int items, int width, int row_tile, int element) {
    float sum = 0;
    const int first = row_tile * width, last = first + width;
    for (int warp = (first * WARPS) / items; warp < WARPS; warp++) {
        const Share share(items, warp);
        if (share.begin >= last) break;
        if (share.end <= first || share.begin == share.end) continue;
        sum += partial[(warp * 2 + (share.begin < first)) * SUMS + element];
    }
    return sum;
}

template <class D>
__device__ void multiply_segment(const Problem &problem, const Segment &segment, int cluster) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int rank = block_of_cluster();
    const int chunk_begin = problem.chunks * rank / SPLIT, width = problem.chunks * (rank + 1) / SPLIT - chunk_begin;
    const int row_begin = (cluster - segment.first_cluster) * segment.rows_per_block;
    const int row_end = min(row_begin + segment.rows_per_block, segment.row_tiles);
    float *partial = (float *)(shared + TABLE_BYTES), *block_sums = partial + WARPS * 2 * SUMS;
    const u8 *x_lane = problem.x + chunk_begin * X_CHUNK + (lane / 4 % COLUMNS * 4 + lane % 4) * 16;  // columns that are not there repeat one that is
    const u32 unit = segment.hash_unit;
    bool first_round = true;

    for (int row = row_begin; row < row_end; row += WARPS) {
        const int rows = min(WARPS, row_end - row), items = rows * width;
        const Share share(items, warp);
        int tile = share.begin / width, chunk = share.begin % width;
        const u8 *codes = segment.codes + ((size_t)(row + tile) * problem.chunks + chunk_begin + chunk) * D::CHUNK_BYTES;
        u32 next[D::WORDS];
        if (share.begin < share.end) D::load(next, codes, lane);
        if (first_round) {
            D::fill(shared, segment.entries);
            wait_for_previous_kernel();
            first_round = false;
        }
        __syncthreads();  // the table is there; the last round's sums are read
        float sum[FRAGMENTS][4] = {};
        for (int item = share.begin; item < share.end; item++) {
            u32 words[D::WORDS];
#pragma unroll
            for (int i = 0; i < D::WORDS; i++) words[i] = next[i];
            const u8 *x = x_lane + chunk * X_CHUNK;
            const bool crosses = ++chunk == width;
            codes += D::CHUNK_BYTES;
            if (crosses) {
                chunk = 0;
                codes += (size_t)(problem.chunks - width) * D::CHUNK_BYTES;
            }
            if (item + 1 < share.end) D::load(next, codes, lane);
#pragma unroll
            for (int pair = 0; pair < CHUNK / 2; pair++) {
                uint4 b[FRAGMENTS];
#pragma unroll
                for (int f = 0; f < FRAGMENTS; f++)
                    b[f] = *(const uint4 *)(x + pair * X_PAIR + f * (64 * COLUMNS));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 a[4];
                    D::decode(a, words, 2 * pair + half, lane, unit, shared);
#pragma unroll
                    for (int f = 0; f < FRAGMENTS; f++)
                        multiply_tile(sum[f], a, half ? b[f].z : b[f].x, half ? b[f].w : b[f].y);
                }
            }
            if (crosses || item + 1 == share.end) {
                float *out = partial + (warp * 2 + (tile > share.begin / width)) * SUMS;
#pragma unroll
                for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int column = f * 8 + lane % 4 * 2 + i % 2, r = lane / 4 + i / 2 * 8;
                        out[column * 16 + r] = sum[f][i];
                        sum[f][i] = 0;
                    }
                tile++;
            }
        }
        __syncthreads();
        if constexpr (SPLIT > 1) {
            for (int i = threadIdx.x; i < rows * WANTED; i += THREADS)
                block_sums[i] = sum_of_warps(partial, items, width, i / WANTED, i % WANTED);
            synchronize_cluster();
        }
        for (int i = threadIdx.x + rank * THREADS; i < rows * WANTED; i += SPLIT * THREADS) {
            const int r = (row + i / WANTED) * 16 + i % 16, column = i % WANTED / 16;
            float value = 0;
            if constexpr (SPLIT == 1) value = sum_of_warps(partial, items, width, i / WANTED, i % WANTED);
            else for (int block = 0; block < SPLIT; block++) value += read_peer(block_sums + i, block);
            if (r < segment.rows && column < problem.batch)
                store(problem, column, segment.out_offset + r, value * problem.x_scales[column] * half_to_float(segment.scales[r]));
        }
        if constexpr (SPLIT > 1) synchronize_cluster();
    }
    if (first_round) wait_for_previous_kernel();
}

template <class... D>
__device__ __forceinline__ void dispatch(const Problem &problem, const Segment &segment, int cluster) {
    int index = 0;
    ((segment.decoder == index++ ? multiply_segment<D>(problem, segment, cluster) : (void)0), ...);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply(const __grid_constant__ Problem problem) {
    let_next_kernel_start();
    const int cluster = blockIdx.x / SPLIT;
    int index = 0;
    while (index + 1 < problem.segment_count && cluster >= problem.segments[index + 1].first_cluster) index++;
    dispatch<DECODERS>(problem, problem.segments[index], cluster);
}
