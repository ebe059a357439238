// Decodes packed weights in registers: one lane, eight weights of a 16 x 16 tile at a time, in the order of the A operand
// of mma.m16n8k16.
//
// Every family is a table of 2^INDEX_BITS entries of one or two weights and a way to an index:
//   hashed (tcq, tcq2): the state s is the last MEMORY bits of the stream, the index the top bits of s (2s + 1) mod 2^MEMORY;
//   plain (vq, nuq): the index is the next INDEX_BITS bits of the stream.
// The table lies in shared memory, each entry repeated for COPIES lanes (32 where it fits: one per bank, no conflicts).
// Bits above a window never reach the index, so nothing masks them; the multiplication also moves the index to where it
// is a byte offset, so that one and-or gives the address.

constexpr int CHUNK = 16;  // tiles of consecutive columns whose bits a lane keeps together: EIGHTHS * 16 bits

__device__ constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

template <int EIGHTHS_, int VALUES_, int INDEX_BITS_, int MEMORY_, bool HASHED_>
struct Decoder {
    static constexpr int EIGHTHS = EIGHTHS_;  // of a bit per weight = bits of a lane per tile
    static constexpr int VALUES = VALUES_;    // weights per table entry
    static constexpr int INDEX_BITS = INDEX_BITS_;
    static constexpr bool HASHED = HASHED_;
    static constexpr int STEPS = 8 / VALUES;
    static constexpr int FULL_WORDS = EIGHTHS / 2;
    static constexpr int WORDS = (EIGHTHS + 1) / 2;  // of 32 bits per lane and chunk; an odd rate ends in half a word
    static constexpr int CHUNK_BYTES = 64 * EIGHTHS;
    static constexpr int FITTING = TABLE_BYTES / (4 << INDEX_BITS);
    static constexpr int COPIES = FITTING < 32 ? FITTING : 32;
    static constexpr int ENTRY_SHIFT = log2_of(4 * COPIES);
    static constexpr u32 INDEX_MASK = ((1u << INDEX_BITS) - 1) << ENTRY_SHIFT;
    static constexpr int HASH_SHIFT = ENTRY_SHIFT - (MEMORY_ - INDEX_BITS);  // from the index's place in the hash

    static __device__ constexpr int end(int step) { return (step + 1) * VALUES * EIGHTHS / 8; }
    static constexpr int HISTORY = MEMORY_ - end(0);  // bits of earlier lanes that the first state needs

    // The chunk's bits for one lane come in parts, each one load of a warp, contiguous: four words per lane while there
    // are four, then two, one, and half a word.
    static constexpr int FOURS = FULL_WORDS / 4;
    static constexpr int PARTS = FOURS + (FULL_WORDS >> 1 & 1) + (FULL_WORDS & 1) + (EIGHTHS & 1);

    static __device__ constexpr int words_before(int part) {
        if (part <= FOURS) return 4 * part;
        const int two = FULL_WORDS >> 1 & 1;
        return part == FOURS + 1 && two ? 4 * FOURS + 2 : part >= PARTS ? WORDS : FULL_WORDS;
    }

    // The first tile after which no bit of `part` is needed any more.
    static __device__ constexpr int last_tile(int part) {
        const int end = words_before(part + 1) * 32;
        return part + 1 == PARTS ? CHUNK - 1 : (end - 1) / EIGHTHS;
    }

    // Where `wanted` is 0 nothing is loaded, without a branch.
    static __device__ __forceinline__ void load_part(u32 (&words)[WORDS], int part, const u8 *chunk, u32 lane, u32 wanted) {
        const int first = words_before(part), count = words_before(part + 1) - first;
        const u8 *from = chunk + 128 * first;
        if (EIGHTHS & 1 && part == PARTS - 1) {
            u16 half = 0;
            asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0;\n@p ld.global.nc.L1::no_allocate.u16 %0, [%1];}"
                : "+h"(half) : "l"(from + 2 * lane), "r"(wanted));
            words[first] = (u32)half << 16;
        } else if (count == 4) {
            asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0;\n@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
                : "+r"(words[first]), "+r"(words[first + 1]), "+r"(words[first + 2]), "+r"(words[first + 3])
                : "l"(from + 16 * lane), "r"(wanted));
        } else if (count == 2) {
            asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0;\n@p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];}"
                : "+r"(words[first]), "+r"(words[first + 1]) : "l"(from + 8 * lane), "r"(wanted));
        } else {
            asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0;\n@p ld.global.nc.L1::no_allocate.u32 %0, [%1];}"
                : "+r"(words[first]) : "l"(from + 4 * lane), "r"(wanted));
        }
    }

    static __device__ __forceinline__ void load(u32 (&words)[WORDS], const u8 *chunk, u32 lane) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) load_part(words, part, chunk, lane, 1);
    }

    // 32 stream bits from bit `begin` of the lane's chunk, of which `used` count.
    static __device__ __forceinline__ u32 bits(const u32 (&words)[WORDS], int begin, int used) {
        const int word = begin / 32, shift = begin % 32;
        if (shift == 0) return words[word];
        if (shift + used <= 32 || word + 1 >= WORDS) return words[word] << shift;
        return __funnelshift_l(words[word + 1], words[word], shift);
    }

    // The eight weights of this lane in tile `tile` of the chunk, as four half2. `unit` is 1 << HASH_SHIFT (1 if negative),
    // and must come from memory: a factor that the compiler knows becomes a shift, on the pipe that is the bottleneck.
    static __device__ __forceinline__ void decode(u32 (&out)[4], const u32 (&words)[WORDS], int tile, u32 lane, u32 unit, const u8 *table) {
        decode(out, words, tile, lane, unit, table, lane % COPIES * 4);
    }

    // The same, where the lane's copies begin so many bytes into the table.
    static __device__ __forceinline__ void decode(u32 (&out)[4], const u32 (&words)[WORDS], int tile, u32 lane, u32 unit, const u8 *table, u32 copy) {
        const int begin = tile * EIGHTHS;
        const u32 first = bits(words, begin, EIGHTHS);
        const u32 second = EIGHTHS > 32 ? bits(words, begin + 32, EIGHTHS - 32) : 0;
        u32 before = 0;
        if constexpr (HISTORY > 0) {
            const u32 last = EIGHTHS <= 32 ? first >> (32 - EIGHTHS) : __funnelshift_r(second, first, 64 - EIGHTHS);
#pragma unroll
            for (int back = 0; back * EIGHTHS < HISTORY; back++)  // the stream of a tile is a circle, and so are lanes
                before |= __shfl_sync(~0u, last, lane - 1 - back) << (back * EIGHTHS);
        }
        u32 value[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 offset;
            if constexpr (HASHED) {
                const u32 s = window(before, first, second, end(step));
                offset = s * (s * (2 * unit) + unit);
                if constexpr (HASH_SHIFT < 0) offset >>= -HASH_SHIFT;
            } else {
                offset = window(before, first, second, end(step) + ENTRY_SHIFT);
            }
            value[step] = *(const u32 *)(table + ((offset & INDEX_MASK) | copy));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = VALUES == 2 ? value[i] : value[2 * i % STEPS] + value[(2 * i + 1) % STEPS] * 65536u;
    }

    // The 32 bits that end `end` bits after the lane's first one.
    static __device__ __forceinline__ u32 window(u32 before, u32 first, u32 second, int end) {
        if (end <= 32) return end == 32 ? first : __funnelshift_r(first, before, 32 - end);
        if (end <= 64) return end == 64 ? second : __funnelshift_r(second, first, 64 - end);
        return second << (end - 64);
    }

    // Table entries into shared memory, by all threads of the block; the caller synchronizes.
    static __device__ void fill(u8 *table, const u32 *entries) {
        constexpr int vector = COPIES < 4 ? COPIES : 4;
        constexpr int total = (1 << INDEX_BITS) * COPIES / vector;
#pragma unroll 16
        for (int i = threadIdx.x; i < total; i += THREADS) {
            const u32 entry = __ldg(entries + i / (COPIES / vector));
            if constexpr (vector == 4) ((uint4 *)table)[i] = make_uint4(entry, entry, entry, entry);
            else if constexpr (vector == 2) ((uint2 *)table)[i] = make_uint2(entry, entry);
            else ((u32 *)table)[i] = entry;
        }
    }
};
