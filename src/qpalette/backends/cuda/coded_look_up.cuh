// Codes of a vector, in pieces that a lane holds in registers, and where their numbers are in a table of look-ups.

// One look-up is of LOOK numbers: two neighbours that have an index each are looked up together where that is 8 bits.
template <class F>
struct Looks {
    static constexpr bool PAIRS = F::WIDTH == 1 && F::BITS <= 4;
    static constexpr int FACTOR = PAIRS ? 2 : 1, LOOK = F::WIDTH * FACTOR, BITS = F::BITS * FACTOR;
    static constexpr int PADDED = (F::DIM + 63) / 64 * 64;  // numbers beyond DIM are of other bytes; nothing comes of them
    static constexpr int COPIES = LOOK == 4 ? 16 : 32, WORDS = LOOK == 4 ? 2 : 1;  // so that a lane has its own bank
    static constexpr int TABLE_BYTES = (1 << BITS) * COPIES * WORDS * 4;
};

__host__ __device__ constexpr int common(int a, int b) { return b ? common(b, a % b) : a; }

// `BYTES` at an address of that ALIGNMENT (of as much as both divide), into the low bytes of words.
template <int BYTES, int ALIGNMENT>
__device__ __forceinline__ void load_bytes(const u8 *from, u32 *words) {
    if constexpr (BYTES % 16 == 0 && ALIGNMENT % 16 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++) {
            const uint4 four = ((const uint4 *)from)[i];
            words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
        }
    } else if constexpr (BYTES % 8 == 0 && ALIGNMENT % 8 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 8; i++) {
            const uint2 two = ((const uint2 *)from)[i];
            words[2 * i] = two.x, words[2 * i + 1] = two.y;
        }
    } else if constexpr (BYTES % 4 == 0 && ALIGNMENT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 4; i++) words[i] = ((const u32 *)from)[i];
    } else if constexpr (BYTES % 2 == 0 && ALIGNMENT % 2 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 2; i++) words[i / 2] = i % 2 ? words[i / 2] | (u32)((const u16 *)from)[i] << 16 : ((const u16 *)from)[i];
    } else {
#pragma unroll
        for (int i = 0; i < BYTES; i++) words[i / 4] = i % 4 ? words[i / 4] | (u32)from[i] << i % 4 * 8 : from[i];
    }
}

// Where the copy of this lane begins. That its bits are not those of an index is hidden from the compiler, which would
// combine them by another instruction in every look-up instead of one addition before all.
template <class F>
__device__ __forceinline__ const u8 *copy_of_lane(const u8 *table) {
    u32 start = threadIdx.x * 4 * Looks<F>::WORDS % 128;
    asm("" : "+r"(start));
    return table + start;
}

// One of PARTS equal parts of a vector's indexes, as they lie.
template <class F, int PARTS>
struct Piece {
    typedef Looks<F> L;
    static constexpr int NUMBERS = L::PADDED / PARTS, UNITS = NUMBERS / L::LOOK, FIELDS = NUMBERS / F::WIDTH;
    __host__ __device__ static constexpr int bits(int plane) { return FIELDS * plane_width(F::BITS, plane); }
    __host__ __device__ static constexpr int first_word(int plane) { return plane ? first_word(plane - 1) + (bits(plane - 1) + 31) / 32 : 0; }
    u32 words[first_word(F::PLANES)];

    template <int PLANE = 0>
    __device__ __forceinline__ void load(const u8 *codes, int part) {
        if constexpr (PLANE < F::PLANES) {
            constexpr int START = plane_start(F::BITS, F::UNITS, PLANE), BITS = bits(PLANE);
            if constexpr (BITS % 8 == 0) load_bytes<BITS / 8, common(common(F::CODE_BYTES, START), BITS / 8 % 16 ? BITS / 8 : 16)>(codes + START + part * (BITS / 8), words + first_word(PLANE));
            else words[first_word(PLANE)] = codes[START + part * BITS / 8] >> part * BITS % 8;
            load<PLANE + 1>(codes, part);
        }
    }

    // Where look-up `unit` is, in bytes behind that of index 0.
    template <int PLANE = 0>
    __device__ __forceinline__ u32 offset(int unit) const {
        if constexpr (PLANE < F::PLANES) {
            constexpr int WIDTH = plane_width(F::BITS, PLANE) * L::FACTOR, UP = plane_shift(F::BITS, PLANE) * L::FACTOR + 7;
            const int bit = unit * WIDTH, down = bit % 32 - UP;
            const u32 word = words[first_word(PLANE) + bit / 32], shifted = down >= 0 ? word >> (down & 31) : word << (-down & 31);
            return shifted & ((1u << WIDTH) - 1) << UP | offset<PLANE + 1>(unit);
        } else return 0;
    }

    // Four numbers from 4 * four on, float16. `table` is the lane's.
    __device__ __forceinline__ void look_up(const u8 *table, int four, u32 (&out)[2]) const {
        if constexpr (L::LOOK == 4) {
            const uint2 found = *(const uint2 *)(table + offset(four));
            out[0] = found.x, out[1] = found.y;
        } else
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int unit = (4 * four + 2 * i) / L::LOOK;
                out[i] = *(const u32 *)(table + offset(unit));
                if constexpr (L::LOOK == 1) out[i] = __byte_perm(out[i], *(const u32 *)(table + offset(unit + 1)), 0x5410);
            }
    }
};
