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
    int before;      // the cost of the expert's matrices before it
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

// What a block has of one run and one matrix.
struct Piece {
    Matrix matrix;
    int row, rows;     // row tiles
    int first, count;  // positions
};

constexpr int PIECES = 16;  // that a block finds at once, each by a lane: of a few tokens all that it has

// Of the block: what it works on, and what its table has. In the shared memory that it is given, behind the table, ahead of the
// sums: all of it may be asked for, so that there is none for variables.
struct State {
    Piece pieces[PIECES];
    int pieces_there;
    bool more;       // pieces behind them
    int begin, end;  // of the block's part, as a cost of all before it
    int run, runs;   // in which it begins, and how many there are
    const u32 *table_there;
};
constexpr int STATE_ROWS = 3, STATE_BYTES = STATE_ROWS * 4 * SUMS;  // as the sums of so many row tiles
static_assert(sizeof(State) <= STATE_BYTES, "a block's state has its room");

__device__ __forceinline__ State &state() { return *(State *)(shared + TABLE_BYTES); }

// Of `cost`, what is ahead of a block's part: in 32 bits, a division of 64 is a call.
__device__ __forceinline__ int share(int cost, int block) {
    const int blocks = gridDim.x;
    return cost / blocks * block + cost % blocks * block / blocks;
}

// The block's part, and the run in which it begins. By all threads, each a run: one after the other they would wait for memory
// at every step of a search.
__device__ __forceinline__ void find_first_run(const Projection &projection) {
    const int runs = projection.plan->runs, cost = projection.plan->cost[projection.index];
    const int begin = share(cost, blockIdx.x);
    State &at = state();
    if (threadIdx.x == 0) {
        at.begin = begin, at.end = share(cost, blockIdx.x + 1);
        at.runs = runs, at.table_there = projection.entries;
        if (runs == 0) at.run = 0;
    }
    for (int run = threadIdx.x; run < runs; run += THREADS) {
        const int before = projection.runs[run].begin[projection.index];
        const int until = run + 1 < runs ? projection.runs[run + 1].begin[projection.index] : cost;
        if (before <= begin && begin < until) at.run = run;  // one of them
    }
}

// What the block has of PIECES matrices, counted from its first run's on. By one warp, each lane a matrix: one after the other
// they would wait for memory at every piece. A row tile is the block's in whose part it begins.
__device__ __forceinline__ void find_pieces(const Projection &projection, int from) {
    State &at = state();
    const int lane = threadIdx.x, number = from + lane, run = at.run + number / projection.parts;
    Piece piece = {};
    bool more = false;
    if (lane < PIECES && run < at.runs) {
        const Run &its = projection.runs[run];
        const Matrix matrix = projection.matrices[its.expert * projection.parts + number % projection.parts];
        const int before = its.begin[projection.index] + matrix.before;
        const int row = max(0, (at.begin - before + matrix.cost - 1) / matrix.cost);
        const int until = min(matrix.row_tiles, (at.end - before + matrix.cost - 1) / matrix.cost);
        piece = {matrix, row, until - row, its.first, its.count};
        more = before + matrix.row_tiles * matrix.cost < at.end;
    }
    const u32 there = __ballot_sync(~0u, piece.rows > 0);
    if (piece.rows > 0) at.pieces[__popc(there & ((1u << lane) - 1))] = piece;
    if (lane == PIECES - 1) at.pieces_there = __popc(there), at.more = more;
}

// The same as threadIdx.x % 32, but for what the compiler makes of it: with several decoders in the kernel it would take that
// remainder again at every look-up (vq-3 among seven: 364 instead of 299 instructions a chunk).
__device__ __forceinline__ u32 lane_of_warp() {
    u32 lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    __builtin_assume(lane < 32);
    return lane;
}

// From row tile `done` of the piece on, as many as there is room for. Inlined: as a function that is called it has fewer registers
// for itself, once there are two decoders, and its loop goes through local memory. What is loaded under a condition has a value
// before: without one the compiler keeps registers for it in all other decoders' loops, which then go there, too.
template <class D>
__device__ __forceinline__ void multiply_piece(const Projection &projection, const Piece &piece, int done) {
    const u32 lane = lane_of_warp();
    const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const int row = piece.row + done, rows = min(projection.most_rows, piece.rows - done);
    Walk<D> item(piece.matrix.codes, projection.chunks, warp, row, rows);
    int *sums = (int *)(shared + TABLE_BYTES + STATE_BYTES);
    u32 words[D::WORDS] = {};
    if (item.left) D::load(words, item.codes, lane);
    const int column = lane / 4, position = piece.first + (column < piece.count ? column : 0);  // absent ones repeat one that is there
    const int x_row = projection.x_rows ? projection.x_rows[position] : position;
    const u8 *x_lane = projection.x + (size_t)x_row * projection.chunks * X_CHUNK + lane % 4 * 16;
    if (state().table_there != piece.matrix.entries) D::fill(shared, piece.matrix.entries);
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) sums[i] = 0;
    const u32 unit = piece.matrix.hash_unit;
    uint4 x[FRAGMENTS][PAIRS] = {};
    int x_chunk = -1;
    if (item.left) load_x<X_PAIR, 0>(x, x_lane + (size_t)(x_chunk = item.chunk) * X_CHUNK);
    __syncthreads();  // the table is there, and the zeros
    if (threadIdx.x == 0) state().table_there = piece.matrix.entries;
    while (item.left) {
        if (item.chunk != x_chunk) load_x<X_PAIR, 0>(x, x_lane + (size_t)(x_chunk = item.chunk) * X_CHUNK);
        Walk<D> next = item;
        next.advance();
        multiply_item<D>(sums + item.tile * SUMS, projection.fixed_point, words, next, x, lane, unit);
        item = next;
    }
    __syncthreads();  // the sums are there, and nobody reads the table any more
    const float unit_of_sums = 1 / projection.fixed_point;  // a power of two
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) {  // each thread what it sets to zero next time
        const int r = (row + i / SUMS) * 16 + i % 16, column = i % SUMS / 16;
        if (r >= piece.matrix.rows || column >= piece.count) continue;
        const int position = piece.first + column, x_row = projection.x_rows ? projection.x_rows[position] : position;
        const float factor = half_to_float(piece.matrix.scales[r]) * projection.x_scales[x_row];
        projection.y[(size_t)position * projection.y_stride + piece.matrix.out_offset + r] = sums[i] * unit_of_sums * factor;
    }
}

struct MultiplyPiece {
    template <class D>
    static __device__ __forceinline__ void run(const Projection &projection, const Piece &piece, int done) {
        multiply_piece<D>(projection, piece, done);
    }
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
    for (int from = 0;; from += PIECES) {
        __syncthreads();  // the run is found; what was read of the pieces before is read
        if (threadIdx.x < 32) find_pieces(projection, from);
        __syncthreads();
        for (int i = 0; i < state().pieces_there; i++) {
            const Piece &piece = state().pieces[i];
            for (int done = 0; done < piece.rows; done += projection.most_rows)
                dispatch<MultiplyPiece, 0, COUNT_OF<DECODERS>>(piece.matrix.decoder, projection, piece, done);
        }
        if (!state().more) return;
    }
}
