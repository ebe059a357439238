// Attention over a cache of codes: what it is told, and what a warp does with its steps of tokens (coded_attend.cu).
//
// Loads that are on their way share a scoreboard, of which a warp has six: to wait for one is to wait for all. So a step's
// values are asked for during its products with keys, the next step's keys right behind these, and the one wait is before the
// products with values. Where values were asked for at the end of a step, a quarter of the loop was a wait for them (nuq-3,
// 131072 tokens, H200).

constexpr int THREADS = 32 * WARPS, HALVES = (ROWS + 3) / 4;  // of eight queries
constexpr int EIGHTS = STEP / 8, WEIGHED = STEP / 4;          // of a step's tokens; those that a lane weighs
constexpr int EXACT = 32;                                     // exact tokens at a time
constexpr float LOWEST = -1e30f;                              // below every score; finite, so that differences are
constexpr float LEAST_SCALE = -14;                            // its logarithm, below that of every byte but 0

typedef Format<KEY_DIM, KEY_WIDTH, KEY_BITS> Keys;
typedef Format<VALUE_DIM, VALUE_WIDTH, VALUE_BITS> Values;
constexpr int QUADS = Piece<Keys, 4>::NUMBERS / 8 * HALVES;  // operands that queries fill

struct Stream {
    const u8 *pages;
    const u16 *sinks, *ring;
    const long long *ring_tokens;
    const u32 *table;                // of look-ups: [entries] or, of four numbers, [entries][2]
    const float *matrix, *mean;      // [heads or 1]: of keys A^-1, of values its transpose
    int page_count, is_shared;
};

struct Problem {
    Stream keys, values;
    const u16 *query;                // [batch][heads][rows][KEY_DIM]
    const u8 *mask;                  // [batch][length]: which tokens count
    const long long *count, *starts; // how many tokens there are; [batch]
    u16 *out;                        // [batch][heads][rows][VALUE_DIM]
    float *parts;                    // [batch][heads][row blocks][splits] of PART numbers
    int *arrived;                    // [batch][heads][row blocks], zeros between launches
    long long query_batch, query_head, query_row, mask_batch;
    int heads, rows, length, sink_count, window;
    float scale;                     // times log2(e)
};

// --- products -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_tile(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3};
    multiply_tile(sum, a, b0, b1);
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

constexpr int WIDE = Looks<Values>::PADDED, PART = 16 + 8 * VALUE_DIM;  // of a split: `highest`, `sum`, `out`

// What a warp makes of its tokens: outputs are relative to `highest`, and still to be divided by `sum`. Number
// g * WIDE / 8 + i is at i * 8 + g; the eight more keep the lanes that store them in different banks.
struct Part {
    float highest[8], sum[8], out[ROWS][WIDE + 8];
};

struct Where {
    int head, row, batch, item;  // item: of the batch's heads
    long long start;
    int tokens;                  // that there are
    const u8 *keys, *values;     // pages
    const u8 *mask;
};

__device__ __forceinline__ bool in_ring(const Problem &problem, const Where &where, int token) {
    return problem.window && token >= where.tokens - problem.window && problem.keys.ring_tokens[token % problem.window] == token;
}

__device__ __forceinline__ bool is_coded(const Problem &problem, const Where &where, int token) {
    const long long place = token - where.start;
    return !(place >= 0 && place < problem.sink_count) && !in_ring(problem, where, token);
}

// A lane weighs the tokens 4 i + t of a step: columns 2 t and 2 t + 1 of the product with keys 8 eight to 8 eight + 7
// are i = 2 eight and the one after. So what a load brings of several tokens are neighbours, in few lines.
__device__ __forceinline__ int token_of_column(int g) { return g / 2 + g % 2 * 4; }

// Where a step lies; from a warp's one to its next are whole pages.
struct Source {
    const u8 *keys, *values;
    u32 place;  // in its page

    __device__ __forceinline__ Source(const Where &where, u32 begin) : place(begin % PAGE) {
        keys = where.keys + (begin / PAGE * Keys::PAGE_BYTES + place * Keys::CODE_BYTES);
        values = where.values + (begin / PAGE * Values::PAGE_BYTES + place * Values::CODE_BYTES);
    }

    __device__ __forceinline__ void advance(u32 pages) { keys += pages * Keys::PAGE_BYTES, values += pages * Values::PAGE_BYTES; }

    // Of a token of the step: scales follow a page's codes.
    __device__ __forceinline__ u32 key_scale(u32 token) const { return keys[(PAGE - place) * Keys::CODE_BYTES + place + token]; }
    __device__ __forceinline__ u32 value_scale(u32 token) const { return values[(PAGE - place) * Values::CODE_BYTES + place + token]; }
};
static_assert(WARPS * STEP % PAGE == 0, "a warp's steps are whole pages from each other");

// A lane's part of a step.
struct Codes {
    Piece<Keys, 4> keys[EIGHTS];          // of token 8 eight + token_of_column(g)
    Piece<Values, 8> values[EIGHTS][2];   // of token 4 (2 eight + odd) + t
    u32 key_scale, value_scale, is_seen;  // of token lane % STEP; as they are loaded, so that nothing waits for them early

    __device__ __forceinline__ void load_keys(const Source &source, const Where &where, int begin) {
        const int lane = threadIdx.x % 32;
        const u8 *own = source.keys + token_of_column(lane / 4) * Keys::CODE_BYTES;
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++) keys[eight].load(own + 8 * eight * Keys::CODE_BYTES, lane % 4);
        const int token = lane % STEP;
        key_scale = source.key_scale(token), value_scale = source.value_scale(token), is_seen = 0;
        if (begin + token < where.tokens) is_seen = where.mask[begin + token];
    }

    __device__ __forceinline__ void load_values(const Source &source) {
        const int lane = threadIdx.x % 32;
        const u8 *own = source.values + lane % 4 * Values::CODE_BYTES;
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) values[eight][odd].load(own + 4 * (2 * eight + odd) * Values::CODE_BYTES, lane / 4);
    }
};

// What a warp's lanes tell each other of a step's tokens 4 i + t: scales of keys, and logarithms of those of values.
struct Scales {
    float key[4][WEIGHED], value[4][WEIGHED];  // [t][i]
};

// Of the queries 4 half + g / 2 of a lane, what scores it has seen; `out` is of the query 4 half + t, numbers 4 j to
// 4 j + 3 of part g of a value.
struct Sums {
    float highest[HALVES], sum[HALVES], out[HALVES][WIDE / 32][4];
};

__device__ __forceinline__ float log2_of_scale(u32 byte) { return ((int)byte - SCALE_ONE) * (1.f / SCALE_STEPS); }

// Products with 16 keys of a step, those of its eights `first` and `first` + 1: query g / 2's with tokens 2 t and 2 t + 1.
__device__ __forceinline__ void multiply_keys(const Piece<Keys, 4> (&pieces)[EIGHTS], int first, const u32 (&queries)[QUADS][4], const u8 *tables,
                                              u32 start, float (&score)[HALVES][EIGHTS][2]) {
    const Indexes<Keys, 4> keys[2] = {pieces[first], pieces[first + 1]};
    float product[2][2][4] = {};
#pragma unroll
    for (int i = 0; i < Piece<Keys, 4>::NUMBERS / 4; i++)
#pragma unroll
        for (int eight = 0; eight < 2; eight++) {
            u32 k[2];
            keys[eight].look_up(tables, start, i, k);
            multiply_tile(product[eight][i % 2], queries[i * HALVES / 2], k[0], k[1]);
        }
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int eight = 0; eight < 2; eight++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
                score[half][first + eight][odd] = product[eight][0][2 * half + odd] + product[eight][1][2 * (HALVES == 1 ? 1 : half) + odd];
}

// Products become scores, and these weights of values, whose scales are multiplied in: as operands of a product whose columns
// are queries' sums of even numbers and of odd ones.
__device__ __forceinline__ void weigh(float (&score)[HALVES][EIGHTS][2], const Scales &scales, u32 wanted, u32 empty, const float (&factor)[HALVES],
                                      const float (&offset)[HALVES], Sums &sums, u32 (&weights)[HALVES][EIGHTS][2]) {
    const int t = threadIdx.x % 4;
    const u32 kept = threadIdx.x / 4 % 2 ? 0xffff0000 : 0x0000ffff;
    float key[WEIGHED], value[WEIGHED];
#pragma unroll
    for (int four = 0; four < WEIGHED / 4; four++) {
        *(float4 *)(key + 4 * four) = *(const float4 *)(scales.key[t] + 4 * four);
        *(float4 *)(value + 4 * four) = *(const float4 *)(scales.value[t] + 4 * four);
    }
    bool has_grown = false;
    float shrink[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        float(&own)[EIGHTS][2] = score[half];
        float top = sums.highest[half];
#pragma unroll
        for (int i = 0; i < WEIGHED; i++) own[i / 2][i % 2] = own[i / 2][i % 2] * key[i] * factor[half] + offset[half];
        if (wanted != ~0u)
#pragma unroll
            for (int i = 0; i < WEIGHED; i++)
                if (!(wanted >> (4 * i + t) & 1)) own[i / 2][i % 2] = -__int_as_float(0x7f800000);
#pragma unroll
        for (int i = 0; i < WEIGHED; i++) top = fmaxf(top, own[i / 2][i % 2] + value[i]);
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        shrink[half] = exp2_of(sums.highest[half] - top), has_grown |= shrink[half] != 1;
        sums.highest[half] = top, sums.sum[half] *= shrink[half];
#pragma unroll
        for (int i = 0; i < WEIGHED; i++) {
            const float above = own[i / 2][i % 2] - top, weight = exp2_of(above + value[i]);
            sums.sum[half] += exp2_of(above);
            weights[half][i / 2][i % 2] = pack(weight, weight) & kept;
        }
        if (empty)
#pragma unroll
            for (int i = 0; i < WEIGHED; i++)
                if (empty >> (4 * i + t) & 1) weights[half][i / 2][i % 2] = 0;
    }
    if (__any_sync(~0u, has_grown))
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const float own = __shfl_sync(~0u, shrink[half], 8 * t);  // of query 4 half + t
#pragma unroll
            for (int j = 0; j < WIDE / 32; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums.out[half][j][c] *= own;
        }
}

// Sums grow by 16 values times their weights. What a look-up gives are neighbours of one token, which stand where a product
// has neighbours to add: weights are zero at one of them, so that nothing has to be taken apart.
__device__ __forceinline__ void add_values(const Piece<Values, 8> (&pieces)[EIGHTS][2], int first, const u32 (&weights)[HALVES][EIGHTS][2],
                                           const u8 *tables, u32 start, Sums &sums) {
    const Indexes<Values, 8> values[2][2] = {{pieces[first][0], pieces[first][1]}, {pieces[first + 1][0], pieces[first + 1][1]}};
#pragma unroll
    for (int j = 0; j < WIDE / 32; j++)
#pragma unroll
        for (int eight = 0; eight < 2; eight++) {
            u32 even[2], odd[2];
            values[eight][0].look_up(tables, start, j, even), values[eight][1].look_up(tables, start, j, odd);
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                const u32(&own)[2] = weights[half][first + eight];
                multiply_tile(sums.out[half][j], even[0], even[1], odd[0], odd[1], own[0], own[1]);
            }
        }
}

// Queries as operands: lower rows are queries g / 2, each of them twice, as weights are; upper rows four others, or where there
// are none the same at the numbers of the step after: half of a product is then for nothing, as zeros would be.
__device__ __forceinline__ void lay_out(const float *queries, u32 (&turned)[QUADS][4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int step = HALVES == 1 ? 2 * quad + i % 2 : quad, query = min(HALVES == 1 ? g / 2 : i % 2 * 4 + g / 2, ROWS - 1);
            const int at = t * Piece<Keys, 4>::NUMBERS + 4 * step + i / 2 * 2;
            const float *own = queries + query * KEY_DIM;
            turned[quad][i] = pack(at < KEY_DIM ? own[at] : 0, at + 1 < KEY_DIM ? own[at + 1] : 0);
        }
}

__device__ __forceinline__ void store_sums(Sums &sums, Part &part) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        float &sum = sums.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 8 == 0) part.highest[4 * half + g / 2] = sums.highest[half], part.sum[4 * half + g / 2] = sum;
        if (const int row = 4 * half + t; row < ROWS)
#pragma unroll
            for (int j = 0; j < WIDE / 32; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) part.out[row][(4 * j + c) * 8 + g] = sums.out[half][j][c];
    }
}

__device__ __forceinline__ int first_step() { return (threadIdx.x / 32 * gridDim.x + blockIdx.x) * STEP; }

// A warp's steps, every (WARPS * splits)th; `codes` are those of the first, at `source`, if there is one.
__device__ __forceinline__ void attend_codes(const Problem &problem, const Where &where, Source source, Codes &codes, const float *queries,
                                             const float *factors, const float *offsets, const u8 *tables, Scales (&scales)[2], Part &part) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stride = WARPS * gridDim.x * STEP;
    u32 turned[QUADS][4];
    lay_out(queries, turned);
    const u32 key_start = start_of_lane<Keys>(0), value_start = start_of_lane<Values>(SAME ? 0 : 1);
    Sums sums = {};
    float factor[HALVES], offset[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const int query = min(4 * half + g / 2, ROWS - 1);
        factor[half] = factors[query], offset[half] = offsets[query], sums.highest[half] = LOWEST;
    }
    const int coded_from = (int)where.start + problem.sink_count, coded_until = where.tokens - problem.window;  // no exact ones
#pragma unroll 1
    for (int begin = first_step(), turn = 0; begin < where.tokens; begin += stride, turn ^= 1) {
        const bool more = begin + stride < where.tokens;
        u32 wanted = __ballot_sync(~0u, codes.is_seen);
        if (begin < coded_from || begin + STEP > coded_until) wanted &= __ballot_sync(~0u, is_coded(problem, where, begin + lane % STEP));
        const u32 empty = __ballot_sync(~0u, codes.value_scale == 0);
        Scales &told = scales[turn];
        told.key[t][lane % STEP / 4] = codes.key_scale ? exp2_of(log2_of_scale(codes.key_scale)) : 0;
        told.value[t][lane % STEP / 4] = codes.value_scale ? log2_of_scale(codes.value_scale) : LEAST_SCALE;
        __syncwarp();
        codes.load_values(source);
        source.advance(stride / PAGE);
        float score[HALVES][EIGHTS][2];
        u32 weights[HALVES][EIGHTS][2];
#pragma unroll
        for (int first = 0; first < EIGHTS; first += 2) multiply_keys(codes.keys, first, turned, tables, key_start, score);
        if (more) codes.load_keys(source, where, begin + stride);
        weigh(score, told, wanted, empty, factor, offset, sums, weights);
#pragma unroll
        for (int first = 0; first < EIGHTS; first += 2) add_values(codes.values, first, weights, tables, value_start, sums);
    }
    __syncthreads();  // tables are no longer read: parts lie there
    store_sums(sums, part);
}
