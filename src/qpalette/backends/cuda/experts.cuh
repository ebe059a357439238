// What the kernels of a layer of experts share. A slot is a place of a token among the experts that it is routed to, and its
// number that of a row wherever results lie. Slots of an expert are cut into runs of at most RUN, in the order of slots.

constexpr int RUN = 8;

// Of an expert. Runs come in the order of `place`, where experts whose tables are alike are neighbours.
struct Expert {
    int place;
    int cost[2];  // of all that it multiplies by first, and last
};

struct Run {
    int place, first, count;  // of slots in the order of runs
    int begin[2];             // cost of all runs before it
};

struct Plan {
    int cost[2];  // of all runs
    int runs;
};

// What the router gave for a slot; -1 where it stands for none.
__device__ __forceinline__ int expert_of(const long long *index, int slot, int experts) {
    const long long given = index[slot];
    return given < 0 || given >= experts ? -1 : (int)given;
}
