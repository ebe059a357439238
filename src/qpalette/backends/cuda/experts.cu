// What the experts of a layer multiply by, first or last, in one launch: y[position] = W'[its expert] x'.
//
// Blocks stay, one on each multiprocessor, and each takes its equal part of the runs' cost, in whole row tiles: a piece is what
// a block has of one run and one matrix. Eight columns of a matrix instruction are eight slots of an expert, or less, so that
// no sum depends on who else is there.

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
    int chunk_bytes;
    u32 hash_unit;   // see Decoder::decode
};

struct Projection {
    const Matrix *matrices;  // [places][parts]
    const Expert *experts;   // [expert_count]
    const long long *slots;  // [slot_count] what the router gave
    const Run *runs;
    const Plan *plan;        // null: a block makes the plan itself
    const int *order;
    const u8 *x;             // [rows][chunks][X_CHUNK]
    const float *x_scales;   // [rows] what each was divided by
    float *y;                // [slots][y_stride]
    const u32 *entries;      // the table of most matrices
    int expert_count, slot_count;
    int slots_of_row;  // slots that share a row of x
    int parts, chunks, y_stride;
    int half_chunk;     // the last, where no input is in its second half; else -1
    int index;          // 0: what experts multiply by first, 1: last
    int decoder;        // of `entries`
    int most_rows;      // row tiles whose sums have room
    float fixed_point;  // see multiply.py
};

// What a block has of one run and one matrix.
struct Piece {
    Matrix matrix;
    int row, rows;  // row tiles
    int count;
    int slots[RUN];  // absent ones repeat one that is there
};

constexpr int PIECES = 16;  // that a block finds at once, each by a lane: of a few tokens all that it has
constexpr int PEERS = 8;    // threads that compare a slot with all others
constexpr int FEW = THREADS / PEERS;  // slots of which every block makes the plan

// Of the block: what it works on, and what its table has. In the shared memory that it is given, behind the table, ahead of the
// sums: all of it may be asked for, so that there is none for variables.
struct State {
    Piece pieces[PIECES];
    int pieces_there;
    bool more;       // pieces behind them
    int begin, end;  // of the block's part, as a cost of all before it
    int run, runs;   // in which it begins, and how many there are
    int cost;        // of all runs
    const u32 *table_there;
    Run few_runs[FEW];
    int few_order[FEW], places[FEW], costs[FEW], ranks[FEW];
};
constexpr int STATE_ROWS = 9, STATE_BYTES = STATE_ROWS * 4 * SUMS;  // as the sums of so many row tiles
static_assert(sizeof(State) <= STATE_BYTES, "a block's state has its room");

__device__ __forceinline__ State &state() { return *(State *)(shared + TABLE_BYTES); }

// Summed over PEERS lanes that follow one another.
__device__ __forceinline__ int sum_of_peers(int value) {
#pragma unroll
    for (int distance = 1; distance < PEERS; distance *= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// Of at most FEW slots, the plan that routes.cu makes of many. Every slot is compared with every other: that needs nothing but what
// the router gave, so that it is done while x is rotated, and saves a launch. Called: inlined it makes a kernel of three decoders
// spill 16 bytes.
__device__ __noinline__ void plan_few(const Projection &projection) {
    State &at = state();
    if (threadIdx.x < FEW) {
        const int slot = threadIdx.x;
        const int expert = slot < projection.slot_count ? expert_of(projection.slots, slot, projection.expert_count) : -1;
        at.places[slot] = expert < 0 ? -1 : projection.experts[expert].place;
        at.costs[slot] = expert < 0 ? 0 : projection.experts[expert].cost[projection.index];
    }
    __syncthreads();
    const int slot = threadIdx.x / PEERS, place = at.places[slot];
    int counts = 0;  // slots of places before, of this place, and of those the ones ahead of this slot: 8 bits each
    for (int other = threadIdx.x % PEERS; other < FEW; other += PEERS) {
        const int its = at.places[other];
        counts += (its >= 0 && its < place) + ((its == place) << 8) + ((its == place && other < slot) << 16);
    }
    counts = sum_of_peers(counts);
    const int smaller = counts & 255, alike = counts >> 8 & 255, rank = counts >> 16;
    if (threadIdx.x % PEERS == 0) {
        at.ranks[slot] = place < 0 ? -1 : rank;
        if (place >= 0) at.few_order[smaller + rank] = slot;
    }
    __syncthreads();
    int before = 0, all = 0, runs = 0;  // cost of the runs before this slot's and of all, and how many there are: 16 bits each
    for (int other = threadIdx.x % PEERS; other < FEW; other += PEERS) {
        const int its = at.places[other], its_rank = at.ranks[other];
        const bool leads = its_rank >= 0 && its_rank % RUN == 0, ahead = its < place || (its == place && its_rank < rank);
        if (leads) all += at.costs[other], runs += 1 << 16;
        if (leads && ahead) before += at.costs[other], runs++;
    }
    before = sum_of_peers(before), all = sum_of_peers(all), runs = sum_of_peers(runs);
    if (threadIdx.x % PEERS == 0 && place >= 0 && rank % RUN == 0)
        at.few_runs[runs & 65535] = {place, smaller + rank, min(RUN, alike - rank), {before, before}};
    if (threadIdx.x == 0) at.cost = all, at.runs = runs >> 16;
    __syncthreads();
}

// Of `cost`, what is ahead of a block's part: in 32 bits, a division of 64 is a call.
__device__ __forceinline__ int share(int cost, int block) {
    const int blocks = gridDim.x;
    return cost / blocks * block + cost % blocks * block / blocks;
}

__device__ __forceinline__ const Run *runs_of(const Projection &projection) {
    return projection.plan ? projection.runs : state().few_runs;
}

// The block's part, and the run in which it begins. By all threads, each a run: one after the other they would wait for memory
// at every step of a search.
__device__ __forceinline__ void find_first_run(const Projection &projection) {
    State &at = state();
    const int runs = projection.plan ? projection.plan->runs : at.runs;
    const int cost = projection.plan ? projection.plan->cost[projection.index] : at.cost;
    const Run *all = runs_of(projection);
    const int begin = share(cost, blockIdx.x);
    __syncthreads();  // all have read what is written here
    if (threadIdx.x == 0) {
        at.begin = begin, at.end = share(cost, blockIdx.x + 1);
        at.runs = runs, at.table_there = projection.entries;
        if (runs == 0) at.run = 0;
    }
    for (int run = threadIdx.x; run < runs; run += THREADS) {
        const int before = all[run].begin[projection.index];
        const int until = run + 1 < runs ? all[run + 1].begin[projection.index] : cost;
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
        const Run &its = runs_of(projection)[run];
        const int *order = (projection.plan ? projection.order : at.few_order) + its.first;
        piece.matrix = projection.matrices[its.place * projection.parts + number % projection.parts];
        piece.count = its.count;
#pragma unroll
        for (int column = 0; column < RUN; column++) piece.slots[column] = order[min(column, its.count - 1)];
        const int before = its.begin[projection.index] + piece.matrix.before, cost = piece.matrix.cost;
        piece.row = max(0, (at.begin - before + cost - 1) / cost);
        piece.rows = min(piece.matrix.row_tiles, (at.end - before + cost - 1) / cost) - piece.row;
        more = before + piece.matrix.row_tiles * cost < at.end;
    }
    const u32 there = __ballot_sync(~0u, piece.rows > 0);
    if (piece.rows > 0) at.pieces[__popc(there & ((1u << lane) - 1))] = piece;
    if (lane == PIECES - 1) at.pieces_there = __popc(there), at.more = more;
}

// A warp's first codes of a piece into the second-level cache, while the piece before it is worked on.
__device__ __forceinline__ void fetch_ahead(const Piece &piece, int chunks, int most_rows) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 rows = min(piece.rows, most_rows), begin = rows * chunks * warp / WARPS, bytes = piece.matrix.chunk_bytes;
    const u8 *codes = piece.matrix.codes + ((size_t)(piece.row + begin % rows) * chunks + begin / rows) * bytes;
    if (lane * 128 < bytes) asm volatile("prefetch.global.L2 [%0];" :: "l"(codes + lane * 128));
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
    const int x_row = piece.slots[lane / 4] / projection.slots_of_row;
    const u8 *x_lane = projection.x + (size_t)x_row * projection.chunks * X_CHUNK + lane % 4 * 16;
    if (state().table_there != piece.matrix.entries) D::fill(shared, piece.matrix.entries);
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) sums[i] = 0;
    const u32 unit = piece.matrix.hash_unit;
    uint4 x[FRAGMENTS][PAIRS] = {};
    int x_chunk = -1;
    wait_for_previous_kernel();
    if (item.left) load_x<X_PAIR, 0>(x, x_lane + (size_t)(x_chunk = item.chunk) * X_CHUNK);
    __syncthreads();  // the table is there, and the zeros
    if (threadIdx.x == 0) state().table_there = piece.matrix.entries;
    while (item.left) {
        if (item.chunk != x_chunk) load_x<X_PAIR, 0>(x, x_lane + (size_t)(x_chunk = item.chunk) * X_CHUNK);
        Walk<D> next = item;
        next.advance();
        const bool whole = item.chunk != projection.half_chunk;
        multiply_item<D, true>(sums + item.tile * SUMS, projection.fixed_point, words, next, x, lane, unit, whole);
        item = next;
    }
    __syncthreads();  // the sums are there, and nobody reads the table any more
    const float unit_of_sums = 1 / projection.fixed_point;  // a power of two
    for (int i = threadIdx.x; i < rows * SUMS; i += THREADS) {  // each thread what it sets to zero next time
        const int r = (row + i / SUMS) * 16 + i % 16, column = i % SUMS / 16;
        if (r >= piece.matrix.rows || column >= piece.count) continue;
        const int slot = piece.slots[column];
        const float factor = half_to_float(piece.matrix.scales[r]) * projection.x_scales[slot / projection.slots_of_row];
        projection.y[(size_t)slot * projection.y_stride + piece.matrix.out_offset + r] = sums[i] * unit_of_sums * factor;
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

// The kernel before has rotated x. What the router gave has been there since before that one began; so has the plan of many
// slots where experts multiply last, and where they do so first it is waited for. Nor does the next kernel need more than that
// before it waits. All else, up to x' itself, is done ahead.
extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply_experts(const __grid_constant__ Projection projection) {
    let_next_kernel_start();
    dispatch<FillTable, 0, COUNT_OF<DECODERS>>(projection.decoder, projection);
    if (!projection.plan) plan_few(projection);
    else if (projection.index == 0) wait_for_previous_kernel();
    find_first_run(projection);
    for (int from = 0;; from += PIECES) {
        __syncthreads();  // the run is found; what was read of the pieces before is read
        if (threadIdx.x < 32) find_pieces(projection, from);
        __syncthreads();
        for (int i = 0; i < state().pieces_there; i++) {
            const Piece &piece = state().pieces[i];
            if (i + 1 < state().pieces_there) fetch_ahead(state().pieces[i + 1], projection.chunks, projection.most_rows);
            for (int done = 0; done < piece.rows; done += projection.most_rows)
                dispatch<MultiplyPiece, 0, COUNT_OF<DECODERS>>(piece.matrix.decoder, projection, piece, done);
        }
        if (!state().more) break;
    }
    wait_for_previous_kernel();  // a block without a piece, too: the kernel ends after those before it
}
