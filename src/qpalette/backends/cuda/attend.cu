// Attention of one new token: GROUP queries share each key. out = softmax(scale q k + mask) v, from a cache as it lies.
//
// A cluster of SPLITS blocks has a sequence's key head; its warps take tiles of 16 keys in turn. Scores and outputs are
// products of mma.m16n8k16: first queries (rows 0 to 7 of 16) times keys, then values times the softmax of the scores,
// whose layout is already that of the second operand. Dimensions are reordered so that every lane loads 16 bytes of a row.
// Warps keep a running maximum; blocks, then the cluster, add up in a fixed order.
//
// Compile-time constants: WARPS, DIM (a multiple of 64), GROUP (1 to 8), TYPE (0 float16, 1 bfloat16).

constexpr int SPLITS = 8, KEYS = 16;
constexpr int LOADS = DIM / 32;     // of 16 bytes: a lane's share of a key, a quarter of it
constexpr int OUT_LOADS = DIM / 64; // of 16 bytes: its share of a value, an eighth
constexpr float LOWEST = -1e30f;    // below every score; finite, so that differences are

struct Problem {
    const u16 *query, *key, *value;  // [batch][heads][DIM], [batch][key heads][length][DIM]
    const u8 *mask;                  // [batch][length]: which keys count
    u16 *out;                        // [batch][key heads][GROUP][DIM]
    long long query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row, mask_batch;  // strides
    int length;
    float scale;  // times log2(e)
};

__device__ __forceinline__ void multiply_tile(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (TYPE == 1)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    if (TYPE == 1) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// What a part of the keys makes of the queries: outputs are relative to `highest`, and still to be divided by `sum`.
// Dimension g * DIM / 8 + i is at i * 8 + g; the four more keep the lanes that store outputs in different banks.
struct Part {
    float highest[8], sum[8], out[GROUP][DIM + 4];
};

// What block `rank` of the cluster has where this one has `from`, in shared memory.
__device__ __forceinline__ float read_remote(const float *from, u32 rank) {
    u32 address = (u32)__cvta_generic_to_shared(from), remote;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
    return value;
}

__device__ __forceinline__ void synchronize_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// A warp's keys, every (WARPS * SPLITS)th tile from `tile` on, into `part`.
__device__ __forceinline__ void attend_tiles(const Problem &problem, int tile, Part &part) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int head = blockIdx.y, batch = blockIdx.z, query = min(g, GROUP - 1);
    const u16 *keys = problem.key + batch * problem.key_batch + head * problem.key_head + t * 8;
    const u16 *values = problem.value + batch * problem.value_batch + head * problem.value_head + g * (DIM / 8);
    const u8 *mask = problem.mask + batch * problem.mask_batch;
    uint4 q[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++)
        q[i] = *(const uint4 *)(problem.query + batch * problem.query_batch + (head * GROUP + query) * problem.query_head + i * 32 + t * 8);
    float highest = LOWEST, sum = 0, out[DIM / 16][4] = {};
    bool first = true;
    for (; tile * KEYS < problem.length; tile += WARPS * SPLITS, first = false) {
        const int begin = tile * KEYS, own = begin + lane % KEYS;
        const bool counts = own < problem.length && mask[own];
        if (!first && !__any_sync(~0u, counts)) continue;  // the first is loaded before its mask is known
        uint4 k[2][LOADS], v[2][2][OUT_LOADS];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < LOADS; i++)
                k[half][i] = *(const uint4 *)(keys + min(begin + half * 8 + g, problem.length - 1) * problem.key_row + i * 32);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
#pragma unroll
                for (int i = 0; i < OUT_LOADS; i++)
                    v[half][odd][i] = *(const uint4 *)(values + min(begin + half * 8 + 2 * t + odd, problem.length - 1) * problem.value_row + i * 8);
        const u32 wanted = __ballot_sync(~0u, counts);
        float score[2][4] = {};  // [keys 0 to 7, 8 to 15][query g: keys 2 t and 2 t + 1; then rows that are not there]
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                multiply_tile(score[half], q[i].x, 0, q[i].y, 0, k[half][i].x, k[half][i].y);
                multiply_tile(score[half], q[i].z, 0, q[i].w, 0, k[half][i].z, k[half][i].w);
            }
        float top = highest;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                float &s = score[half][odd];
                s = wanted >> (half * 8 + 2 * t + odd) & 1 ? s * problem.scale : -__int_as_float(0x7f800000);
                top = fmaxf(top, s);
            }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float shrink = exp2_of(highest - top);
        highest = top, sum *= shrink;
        u32 weights[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float one = exp2_of(score[half][0] - top), two = exp2_of(score[half][1] - top);
            sum += one + two, weights[half] = pack(one, two);
        }
        const float shrinks[2] = {__shfl_sync(~0u, shrink, 8 * t), __shfl_sync(~0u, shrink, 8 * t + 4)};  // of queries 2 t, 2 t + 1
#pragma unroll
        for (int i = 0; i < OUT_LOADS; i++) {
            const u32(&even0)[4] = (const u32(&)[4])v[0][0][i], (&odd0)[4] = (const u32(&)[4])v[0][1][i];
            const u32(&even1)[4] = (const u32(&)[4])v[1][0][i], (&odd1)[4] = (const u32(&)[4])v[1][1][i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float(&o)[4] = out[i * 4 + j];
#pragma unroll
                for (int c = 0; c < 4; c++) o[c] *= shrinks[c % 2];
                multiply_tile(o, __byte_perm(even0[j], odd0[j], 0x5410), __byte_perm(even0[j], odd0[j], 0x7632),
                              __byte_perm(even1[j], odd1[j], 0x5410), __byte_perm(even1[j], odd1[j], 0x7632), weights[0], weights[1]);
            }
        }
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (t == 0) part.highest[g] = highest, part.sum[g] = sum;
#pragma unroll
    for (int j = 0; j < DIM / 16; j++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (2 * t + c % 2 < GROUP) part.out[2 * t + c % 2][(2 * j + c / 2) * 8 + g] = out[j][c];
}

extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(32 * WARPS, 1) attend(const __grid_constant__ Problem problem) {
    extern __shared__ __align__(16) Part parts[];  // of the warps, then of the block
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, rank = blockIdx.x;
    attend_tiles(problem, warp * SPLITS + rank, parts[warp]);
    __syncthreads();
    Part &whole = parts[WARPS];
    for (int i = threadIdx.x; i < GROUP * DIM; i += 32 * WARPS) {
        const int query = i / DIM;
        float highest = LOWEST, sum = 0, value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, parts[w].highest[query]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float shrink = exp2_of(parts[w].highest[query] - highest);
            sum += shrink * parts[w].sum[query], value += shrink * parts[w].out[query][i % DIM];
        }
        whole.out[query][i % DIM] = value;
        if (i % DIM == 0) whole.highest[query] = highest, whole.sum[query] = sum;
    }
    synchronize_cluster();
    for (int i = threadIdx.x * SPLITS + rank; i < GROUP * DIM; i += SPLITS * 32 * WARPS) {
        const int query = i / DIM, place = i % DIM;
        float highests[SPLITS], sums[SPLITS], values[SPLITS];
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            highests[s] = read_remote(&whole.highest[query], s);
            sums[s] = read_remote(&whole.sum[query], s);
            values[s] = read_remote(&whole.out[query][place], s);
        }
        float highest = LOWEST, sum = 0, value = 0;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) highest = fmaxf(highest, highests[s]);
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            const float shrink = exp2_of(highests[s] - highest);
            sum += shrink * sums[s], value += shrink * values[s];
        }
        const size_t head = ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * GROUP + query;
        problem.out[head * DIM + place % 8 * (DIM / 8) + place / 8] = (u16)pack(sum == 0 ? 0 : value / sum, 0);
    }
    synchronize_cluster();  // a block's shared memory stays until all have read it
}
