// What the kernels of a layer of experts share. A slot is a place of a token among the experts that it is routed to; slots
// lie sorted by expert, each at its position, and are cut into runs of at most RUN.

constexpr int RUN = 8;

struct Run {
    int expert, first, count;  // of positions
    int begin[2];              // cost of all runs before it: of what an expert multiplies by first, and last
};

struct Plan {
    int cost[2];  // of all runs
    int runs, positions;
};
