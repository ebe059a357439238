// What stands between the two products of an expert.
//
// Compile-time constants: FUNCTION (0 silu, 1 gelu, 2 gelu of tanh, 3 relu squared), GATED, INTERLEAVED.

struct Gate {
    const void *bias;  // [experts][F] of what is computed first; null: none
    int bias_type;
    float limit, alpha, offset;
};

__device__ __forceinline__ float bent(float x) {
    if (FUNCTION == 0) return x / (1 + expf(-x));
    if (FUNCTION == 1) return x * normcdff(x);
    if (FUNCTION == 2) return .5f * x * (1 + tanhf(.7978845608f * (x + .044715f * x * x * x)));
    return x > 0 ? x * x : 0;
}

// Input `k` of `columns` of what an expert multiplies by last, of the row that it computed first.
__device__ __forceinline__ float gated(const Gate &gate, const float *first, int expert, int columns, int k) {
    const int at = INTERLEAVED ? 2 * k : k, beside = INTERLEAVED ? at + 1 : columns + k;
    const size_t biases = (size_t)expert * (GATED ? 2 * columns : columns);
    float x = first[at] + (gate.bias ? load(gate.bias, biases + at, gate.bias_type) : 0);
    float up = 1;
    if (GATED) {
        up = first[beside] + (gate.bias ? load(gate.bias, biases + beside, gate.bias_type) : 0);
        x = x > gate.limit ? gate.limit : x;  // what is no number stays so
        up = (up > gate.limit ? gate.limit : up < -gate.limit ? -gate.limit : up) + gate.offset;
    }
    return bent(x * gate.alpha) / gate.alpha * up;
}
