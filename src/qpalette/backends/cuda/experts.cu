// What the experts of a layer multiply by, first or last, in one launch: y[position] = W'[its expert] x'.
//
// Blocks stay, one on each multiprocessor, and each takes its equal part of the runs' cost, in whole row tiles: a piece is what
// a block has of one run and one matrix. Eight columns of a matrix instruction are eight slots of an expert, or less, so that
// no sum depends on who else is there. What is known of routes comes from the kernels before.

static_assert(BATCH == RUN && FRAGMENTS == 1, "a run's slots are the columns of one fragment");
constexpr int X_PAIR = 64, X_CHUNK = PAIRS * X_PAIR;  // bytes of x', a column for itself

struct Matrix {
    const u8 *codes;     // [row tiles][chunks][CHUNK_BYTES]
    const u32 *entries;  // the decoder's table
    const u16 *scales;   // [M] float16
    int row_tiles, rows;
    int out_offset;  // of its first output in a row of y
    int decoder;     // its index in DECODERS
    int cost;        // of a row tile
    u32 hash_unit;   // see Decoder::decode
};

struct Projection {
    const Matrix *matrices;  // [experts][parts]
    const Run *runs;
    const Plan *plan;
    const u8 *x;             // [rows][chunks][X_CHUNK]
    const float *x_scales;   // [rows] what each was divided by
    const int *x_rows;       // of each position; null: the same
    float *y;                // [positions][y_stride]
    int parts, chunks, y_stride;
    int index;          // 0: what experts multiply by first, 1: last
    int most_rows;      // row tiles whose sums have room
    float fixed_point;  // see multiply.py
};

struct Piece {
    Matrix matrix;
    int row, rows;     // row tiles
    int first, count;  // positions
    bool fill;         // the table is another one
};

// Of the block: what it works on, where its part goes on, and what its table has. In the shared memory that it is given, behind
// the table, ahead of the sums: all of it may be asked for, so that there is none for variables.
struct State {
    Piece piece;
    long long begin;  // the cost of what is before this matrix
    int run, part, tile;
    const u32 *table_there;
};
constexpr int STATE_BYTES = 4 * SUMS;  // as the sums of a row tile
static_assert(sizeof(State) <= STATE_BYTES, "room for one row tile's sums is enough");

__device__ __forceinline__ State &state() { return *(State *)(shared + TABLE_BYTES); }

__device__ __forceinline__ long long share(const Projection &projection, int block) {
    return projection.plan->cost[projection.index] * block / gridDim.x;
}

// Before the first piece: the run in which the block's part begins. By one thread, like what follows.
__device__ void find_first_run(const Projection &projection) {
    const long long begin = share(projection, blockIdx.x);
    int low = 0, high = projection.plan->runs;  // the last run that does not begin later
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (projection.runs[middle].begin[projection.index] <= begin) low = middle;
        else high = middle;
    }
    State &at = state();
    at.run = low, at.part = at.tile = 0, at.table_there = nullptr;
    at.begin = high ? projection.runs[low].begin[projection.index] : 0;
}

// A row tile is the block's in whose part it begins.
__device__ void find_next_piece(const Projection &projection) {
    const long long begin = share(projection, blockIdx.x), end = share(projection, blockIdx.x + 1);
    State &at = state();
    Piece &piece = at.piece;
    for (piece.rows = 0; at.run < projection.plan->runs && at.begin < end; at.begin += piece.matrix.row_tiles * (long long)piece.matrix.cost) {
        const Run &run = projection.runs[at.run];
        const Matrix matrix = projection.matrices[run.expert * projection.parts + at.part];
        const long long before = (begin - at.begin + matrix.cost - 1) / matrix.cost, until = (end - at.begin + matrix.cost - 1) / matrix.cost;
        const int tile = max(at.tile, (int)max(before, 0ll)), tiles = (int)min((long long)matrix.row_tiles, until);
        piece.matrix = matrix;
        if (tile < tiles) {
            piece.row = tile, piece.rows = min(projection.most_rows, tiles - tile);
            piece.first = run.first, piece.count = run.count;
            piece.fill = at.table_there != matrix.entries, at.table_there = matrix.entries;
            at.tile = tile + piece.rows;
            return;
        }
        at.tile = 0;
        if (++at.part == projection.parts) at.part = 0, at.run++;
    }
}

// Not inlined: of a loop around it the compiler would keep more than there are registers for (128 bytes spilled).
template <class D>
__device__ __noinline__ void multiply_piece(const Projection &projection) {
    const Piece &piece = state().piece;
    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const int rows = piece.rows;
    Walk<D> item(piece.matrix.codes, projection.chunks, warp, piece.row, rows);
    int *sums = (int *)(shared + TABLE_BYTES + STATE_BYTES);
    u32 words[D::WORDS];
    if (item.left) D::load(words, item.codes, lane);
    if (piece.fill) D::fill(shared, piece.matrix.entries);
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) sums[i] = 0;
    const int column = lane / 4, position = piece.first + (column < piece.count ? column : 0);  // absent ones repeat one that is there
    const int x_row = projection.x_rows ? projection.x_rows[position] : position;
    const u8 *x_lane = projection.x + (size_t)x_row * projection.chunks * X_CHUNK + lane % 4 * 16;
    const u32 unit = piece.matrix.hash_unit;
    uint4 x[FRAGMENTS][PAIRS];
    int x_chunk = -1;
    __syncthreads();  // the table is there, and the zeros
    while (item.left) {
        if (item.chunk != x_chunk) load_x<X_PAIR, 0>(x, x_lane + (size_t)(x_chunk = item.chunk) * X_CHUNK);
        Walk<D> next = item;
        next.advance();
        multiply_item<D>(sums + item.tile * SUMS, projection.fixed_point, words, next, x, lane, unit);
        item = next;
    }
    __syncthreads();
    const float unit_of_sums = 1 / projection.fixed_point;  // a power of two
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) {  // each thread what it sets to zero next time
        const int r = (piece.row + i / SUMS) * 16 + i % 16, column = i % SUMS / 16;
        if (r >= piece.matrix.rows || column >= piece.count) continue;
        const int position = piece.first + column, x_row = projection.x_rows ? projection.x_rows[position] : position;
        const float factor = half_to_float(piece.matrix.scales[r]) * projection.x_scales[x_row];
        projection.y[(size_t)position * projection.y_stride + piece.matrix.out_offset + r] = sums[i] * unit_of_sums * factor;
    }
}

struct MultiplyPiece {
    template <class D>
    static __device__ __forceinline__ void run(const Projection &projection) { multiply_piece<D>(projection); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply_experts(const __grid_constant__ Projection projection) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (threadIdx.x == 0) find_first_run(projection);
    while (true) {
        __syncthreads();  // what was read of the piece before is read
        if (threadIdx.x == 0) find_next_piece(projection);
        __syncthreads();
        if (state().piece.rows == 0) return;
        dispatch<MultiplyPiece, 0, COUNT_OF<DECODERS>>(state().piece.matrix.decoder, projection);
    }
}
