// Codes of a vector, in pieces that a lane holds in registers, and where their numbers are in a table of look-ups.
//
// A lane's entries are STRIDE bytes from each other, so that an index in a byte and the lane's place, in another one, make an
// address by one instruction. Where two tables are wanted, the other one lies between.

constexpr int STRIDE = 256;

// One look-up is of LOOK numbers: two neighbours that have an index each are looked up together where that is 8 bits.
template <class F>
struct Looks {
    static constexpr bool PAIRS = F::WIDTH == 1 && F::BITS <= 4;
    static constexpr int FACTOR = PAIRS ? 2 : 1, LOOK = F::WIDTH * FACTOR, BITS = F::BITS * FACTOR;
    static constexpr int PADDED = (F::DIM + 63) / 64 * 64;  // numbers beyond DIM are of other bytes; nothing comes of them
    static constexpr int COPIES = LOOK == 4 ? 16 : 32, WORDS = LOOK == 4 ? 2 : 1;  // so that a lane has its own bank
    static constexpr int TABLE_BYTES = (1 << BITS) * STRIDE;
    static_assert(COPIES * WORDS * 4 == STRIDE / 2, "an entry has a copy for each bank");
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

// The copies of each entry, as the first or the second table.
template <class F, int BLOCK_THREADS>
__device__ __forceinline__ void spread_table(const u32 *from, u8 *memory, int table) {
    typedef Looks<F> L;
    constexpr int ROW = STRIDE / 8, COUNT = (1 << L::BITS) * ROW;  // words
#pragma unroll
    for (int i = 0; i < (COUNT + BLOCK_THREADS - 1) / BLOCK_THREADS; i++)
        if (const int at = threadIdx.x + i * BLOCK_THREADS; at < COUNT)
            ((u32 *)memory)[at / ROW * 2 * ROW + table * ROW + at % ROW] = from[at / ROW * L::WORDS + at % L::WORDS];
}

// Where this lane's entries begin, of the first or of the second table. That its bits are not those of an index is hidden from
// the compiler, which would combine them by another instruction in every look-up.
template <class F>
__device__ __forceinline__ u32 start_of_lane(int table) {
    u32 start = threadIdx.x * 4 * Looks<F>::WORDS % (STRIDE / 2) + table * (STRIDE / 2);
    asm("" : "+r"(start));
    return start;
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

    // Index `unit`, `up` bits from the lowest.
    template <int PLANE = 0>
    __device__ __forceinline__ u32 index(int unit, int up) const {
        if constexpr (PLANE < F::PLANES) {
            constexpr int WIDTH = plane_width(F::BITS, PLANE) * L::FACTOR, SHIFT = plane_shift(F::BITS, PLANE) * L::FACTOR;
            const int bit = unit * WIDTH, down = bit % 32 - SHIFT - up;
            const u32 word = words[first_word(PLANE) + bit / 32], shifted = down >= 0 ? word >> (down & 31) : word << (-down & 31);
            return shifted & ((1u << WIDTH) - 1) << (SHIFT + up) | index<PLANE + 1>(unit, up);
        } else return 0;
    }
};

// The indexes of a piece, and its numbers. Fields of 8 bits are bytes as they lie; of 4, and of 4 and 2, eight are made bytes of
// two words together, the even ones and the odd ones: some 1.25 instructions for an index instead of four.
template <class F, int PARTS>
struct Indexes {
    typedef Looks<F> L;
    typedef Piece<F, PARTS> Lane;
    static constexpr int FIRST = plane_width(F::BITS, 0) * L::FACTOR, SECOND = L::BITS - FIRST;
    static constexpr bool WHOLE = FIRST == 8, EIGHTS = FIRST == 4 && (SECOND == 0 || SECOND == 2) && Lane::UNITS % 8 == 0;
    static constexpr int WORDS = EIGHTS ? Lane::UNITS / 4 : 1;
    const Lane &piece;
    u32 bytes[WORDS];

    __device__ __forceinline__ Indexes(const Lane &piece) : piece(piece) {
        if constexpr (EIGHTS)
#pragma unroll
            for (int eight = 0; eight < Lane::UNITS / 8; eight++) {
                const u32 first = piece.words[eight];
                u32 even = first & 0x0f0f0f0f, odd = first >> 4 & 0x0f0f0f0f;
                if constexpr (SECOND == 2) {  // 16 bits, spread to four of each byte: those of an even index, then of an odd one
                    u32 spread = __byte_perm(piece.words[Lane::first_word(1) + eight / 2], 0, eight % 2 ? 0x4342 : 0x4140);
                    spread = (spread | spread << 4) & 0x0f0f0f0f;
                    even |= spread << 4 & 0x30303030, odd |= spread << 2 & 0x30303030;
                }
                bytes[2 * eight] = even, bytes[2 * eight + 1] = odd;
            }
    }

    // Where look-up `unit` is, for a lane whose entries begin at `start`.
    __device__ __forceinline__ u32 place(int unit, u32 start) const {
        if constexpr (WHOLE) return __byte_perm(piece.words[unit / 4], start, 0x7704 | unit % 4 << 4);
        else if constexpr (EIGHTS) return __byte_perm(bytes[unit / 8 * 2 + unit % 2], start, 0x7704 | unit / 2 % 4 << 4);
        else return piece.index(unit, 8) | start;
    }

    // Four numbers from 4 * four on, float16.
    __device__ __forceinline__ void look_up(const u8 *table, u32 start, int four, u32 (&out)[2]) const {
        if constexpr (L::LOOK == 4) {
            const uint2 found = *(const uint2 *)(table + place(four, start));
            out[0] = found.x, out[1] = found.y;
        } else
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int unit = (4 * four + 2 * i) / L::LOOK;
                out[i] = *(const u32 *)(table + place(unit, start));
                if constexpr (L::LOOK == 1) out[i] = __byte_perm(out[i], *(const u32 *)(table + place(unit + 1, start)), 0x5410);
            }
    }
};
