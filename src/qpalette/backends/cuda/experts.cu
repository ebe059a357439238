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
    const u32 *entries;      // the table of most matrices
    int parts, chunks, y_stride;
    int index;          // 0: what experts multiply by first, 1: last
    int decoder;        // of `entries`
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
    int begin, end;  // of the block's part, as a cost of all before it
    int before;      // the cost of what is before this matrix
    int run, part, tile;
    const u32 *table_there;
};
constexpr int STATE_BYTES = 4 * SUMS;  // as the sums of a row tile
static_assert(sizeof(State) <= STATE_BYTES, "room for one row tile's sums is enough");

__device__ __forceinline__ State &state() { return *(State *)(shared + TABLE_BYTES); }

// Of `cost`, what is ahead of a block's part: in 32 bits, a division of 64 is a call.
__device__ __forceinline__ int share(int cost, int block) {
    const int blocks = gridDim.x;
    return cost / blocks * block + cost % blocks * block / blocks;
}

// Before the first piece: the block's part, and the run in which it begins. By all threads, each a run: one after the other
// they would wait for memory at every step of a search.
__device__ __forceinline__ void find_first_run(const Projection &projection) {
    const int runs = projection.plan->runs, cost = projection.plan->cost[projection.index];
    const int begin = share(cost, blockIdx.x);
    State &at = state();
    if (threadIdx.x == 0) {
        at.begin = begin, at.end = share(cost, blockIdx.x + 1);
        at.part = at.tile = 0, at.table_there = projection.entries;
        if (runs == 0) at.run = at.before = 0;
    }
    for (int run = threadIdx.x; run < runs; run += THREADS) {
        const int before = projection.runs[run].begin[projection.index];
        const int until = run + 1 < runs ? projection.runs[run + 1].begin[projection.index] : cost;
        if (before <= begin && begin < until) at.run = run, at.before = before;  // one of them
    }
}

// A row tile is the block's in whose part it begins. By one thread.
__device__ __forceinline__ void find_next_piece(const Projection &projection) {
    State &at = state();
    Piece &piece = at.piece;
    for (piece.rows = 0; at.run < projection.plan->runs && at.before < at.end; at.before += piece.matrix.row_tiles * piece.matrix.cost) {
        const Run &run = projection.runs[at.run];
        const Matrix matrix = projection.matrices[run.expert * projection.parts + at.part];
        const int first = (at.begin - at.before + matrix.cost - 1) / matrix.cost, until = (at.end - at.before + matrix.cost - 1) / matrix.cost;
        const int tile = max(at.tile, first), tiles = min(matrix.row_tiles, until);
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

// Inlined: as a function that is called it has fewer registers for itself, once there are two decoders, and its loop goes
// through local memory (2.5, 3.25 and 4 bits: 62 loads and 28 stores among 643 instructions, where alone it has 465).
template <class D>
__device__ __forceinline__ void multiply_piece(const Projection &projection) {
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

struct FillTable {
    template <class D>
    static __device__ __forceinline__ void run(const Projection &projection) { D::fill(shared, projection.entries); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply_experts(const __grid_constant__ Projection projection) {
    dispatch<FillTable, 0, COUNT_OF<DECODERS>>(projection.decoder, projection);  // which no kernel before has written
    wait_for_previous_kernel();
    let_next_kernel_start();
    find_first_run(projection);
    while (true) {
        __syncthreads();  // what was read of the piece before is read
        if (threadIdx.x == 0) find_next_piece(projection);
        __syncthreads();
        if (state().piece.rows == 0) return;
        dispatch<MultiplyPiece, 0, COUNT_OF<DECODERS>>(state().piece.matrix.decoder, projection);
    }
}
