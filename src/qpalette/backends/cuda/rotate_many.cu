// x' = Q diag(d) x for many tokens, as `rotate` writes it: Q = A (x) H, d signs, x in 16 bits. A comes first, on matrix
// instructions, whose operands x with its signs is as it stands; A is UNIT times matrices of 16 bits, for a Hadamard matrix
// of order DENSE one of 1 and -1, whose products are exact.
//
// A block has ROWS of A's rows for a token, a warp TILES tiles of sixteen of them for 8 COLUMNS columns of H. A lane loads
// COLUMNS consecutive columns, one for each of as many instructions: in a sum they are registers, and so the first bits of
// H's butterflies. Two lanes, or four, exchange the next ones, and the last come through shared memory.
//
// Compile-time constants: DENSE, LOG_H (5 to 10), TILES, GROUPS (of a block's warps, those for the same columns), PIECES
// (matrices that A is the sum of), and those of rotate.cuh.

constexpr int H = 1 << LOG_H, COLUMNS = H < 64 ? 4 : 8, CHUNKS = H / (8 * COLUMNS), THREADS = 32 * CHUNKS * GROUPS;
constexpr int ALL_TILES = (DENSE + 15) / 16, ROWS = 16 * TILES * GROUPS;
constexpr int PART = ALL_TILES <= 2 ? ALL_TILES : 1;  // of x's sixteens of rows, in registers
constexpr int SHUFFLED = LOG_H > 9 || COLUMNS == 4 ? 2 : 1, LOW = 2 * COLUMNS << SHUFFLED, HIGH = H / LOW;

struct __align__(2 * COLUMNS) Columns { u32 pairs[COLUMNS / 2]; };  // of x, loaded at once

// Row `i` of the four that a lane has of sixteen.
__device__ __forceinline__ u32 row_of(u32 tile, u32 i) { return tile * 16 + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

// Eight signs as `with_signs` wants them: those of low halves in the low half.
__device__ __forceinline__ u32 spread_signs(u32 negative) { return (negative & 0x55) << 9 | (negative & 0xaa) << 24; }

__device__ __forceinline__ u32 with_signs(u32 pair, u32 spread, int number) { return pair ^ (spread << (6 - 2 * number) & 0x80008000u); }

__device__ __forceinline__ void add_squares(u32 pair, float (&sums)[2]) {
    sums[0] += squared(IN_TYPE == 1 ? __uint_as_float(pair << 16) : half_to_float(pair & 0xffff));
    sums[1] += squared(IN_TYPE == 1 ? __uint_as_float(pair & 0xffff0000u) : half_to_float(pair >> 16));
}

// Where a row's column lies in shared memory, fours of them moved so that lanes which write or read at once find all banks.
__device__ __forceinline__ u32 spot(u32 row, u32 column) { return row * H + (column ^ (column / 32 % 2 * 4 | row % 2 * 24)); }

extern "C" __global__ void __launch_bounds__(THREADS)
rotate_many(const u16 *x, const u8 *signs, const uint4 *dense, float unit, int padded, u16 *out, float *scales, uint4 *zeros,
            int zero_count) {
    extern __shared__ __align__(16) float room[];  // [ROWS, or all rows of A][H]
    __shared__ float squares[THREADS / 32];
    let_next_kernel_start();  // a product, which waits
    const u32 token = blockIdx.x, lane = threadIdx.x % 32, first_row = blockIdx.y * ROWS;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0), group = GROUPS == 1 ? 0 : warp / CHUNKS;  // known to be a warp's
    const u32 column = (warp % CHUNKS * 8 + lane / 4) * COLUMNS, tile_of_warp = (blockIdx.y * GROUPS + group) * TILES;
    x += (size_t)token * DENSE * H + column, signs += column / 8, dense += lane;
    float sums[TILES][COLUMNS][4] = {}, square[2] = {};
    for (int part = 0; part < ALL_TILES; part += PART) {
        u32 negative[PART][4];
        uint4 a[PART][TILES][PIECES];
        Columns elements[PART][4];
#pragma unroll
        for (int p = 0; p < PART; p++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                negative[p][i] = spread_signs(signs[min(row_of(part + p, i), DENSE - 1u) * (H / 8)] >> column % 8);
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++)
                    a[p][t][piece] = dense[((min(tile_of_warp + t, ALL_TILES - 1u) * ALL_TILES + part + p) * PIECES + piece) * 32];
        }
        if (part == 0) wait_for_previous_kernel();  // nothing above depends on it
#pragma unroll
        for (int p = 0; p < PART; p++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 row = row_of(part + p, i);
                elements[p][i] = row < DENSE ? *(const Columns *)(x + row * H) : Columns{};
            }
        if (part == 0) leave_zeros<THREADS>(zeros, zero_count);
        if (group == 0) {  // which sees all of x
#pragma unroll
            for (int i = 0; i < PART * 4; i++)
#pragma unroll
                for (int pair = 0; pair < COLUMNS / 2; pair++) add_squares(elements[i / 4][i % 4].pairs[pair], square);
        }
#pragma unroll
        for (int p = 0; p < PART; p++)
#pragma unroll
            for (int pair = 0; pair < COLUMNS / 2; pair++) {
                u32 rows[4];
#pragma unroll
                for (int i = 0; i < 4; i++) rows[i] = with_signs(elements[p][i].pairs[pair], negative[p][i], pair);
#pragma unroll
                for (int own = 0; own < 2; own++) {
                    const u32 halves = own ? 0x7632 : 0x5410;
                    const u32 b0 = __byte_perm(rows[0], rows[1], halves), b1 = __byte_perm(rows[2], rows[3], halves);
#pragma unroll
                    for (int t = 0; t < TILES; t++)
#pragma unroll
                        for (int piece = 0; piece < PIECES; piece++) {
                            const uint4 four = a[p][t][piece];
                            const u32 factors[4] = {four.x, four.y, four.z, four.w};
                            multiply_tile<IN_TYPE == 1>(sums[t][2 * pair + own], factors, b0, b1);
                        }
                }
            }
    }
    leave_sum_of_warp(square[0] + square[1], squares);
    const u32 rows = min((u32)ROWS, DENSE - first_row);
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 first = (group * TILES + t) * 16 + half * 8, row = first + lane / 4;
            if (first >= rows) continue;  // of the whole warp, whose lanes exchange values
            float values[2 * COLUMNS];
#pragma unroll
            for (int i = 0; i < 2 * COLUMNS; i++) values[i] = sums[t][i % COLUMNS][half * 2 + i / COLUMNS];
            butterflies(values);
#pragma unroll
            for (int i = 0; i < 2 * COLUMNS; i++) values[i] = shuffled_butterflies<SHUFFLED>(values[i]);
            const u32 to = spot(row, (warp % CHUNKS * 4 + lane % 4) * 2 * COLUMNS);
            if (row >= rows) continue;
#pragma unroll
            for (int i = 0; i < 2 * COLUMNS; i += 4)
                *(float4 *)&room[to ^ i] = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
    __syncthreads();
    const float norm = sqrtf(sum_of_warps<THREADS / 32>(squares)), scale = divisor_of(norm), factor = unit / scale;
    for (u32 i = threadIdx.x; i < rows * (LOW / 2); i += THREADS) {  // now a thread has all the high bits, of two columns
        const u32 row = i / (LOW / 2), low = i % (LOW / 2) * 2, from = spot(row, low);
        u32 *to = (u32 *)(out + place((first_row + row) * H + low, token, padded));
        float even[HIGH], odd[HIGH];
#pragma unroll
        for (u32 h = 0; h < HIGH; h++) {
            const float2 both = *(const float2 *)&room[(from ^ h * LOW / 32 % 2 * 4) + h * LOW];  // spot(row, h * LOW + low)
            even[h] = both.x, odd[h] = both.y;
        }
        butterflies(even), butterflies(odd);
#pragma unroll
        for (u32 h = 0; h < HIGH; h++)  // LOW is 32 or more
            to[h * LOW * ALL_COLUMNS / 2] = to_bits<BFLOAT16>(even[h] * factor) | (u32)to_bits<BFLOAT16>(odd[h] * factor) << 16;
    }
    if (blockIdx.y == 0) finish_token<THREADS>(token, DENSE * H, padded, out, scales, scale, norm);
}
