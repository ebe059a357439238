// A packed matrix decoded to float16, row-major, without its row scales: for batches where a library's matrix product wins.
//
// A warp decodes a chunk at a time. Compile-time constants: THREADS, TABLE_BYTES, DECODERS (one type).

extern __shared__ __align__(16) u8 table[];

typedef DECODERS D;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
unpack(const u8 *codes, const u32 *entries, int row_tiles, int chunks, u32 hash_unit, u32 *out) {
    const u32 lane = threadIdx.x % 32;
    const size_t stride = (size_t)chunks * CHUNK * 8;  // of a row of `out`, in half2
    D::fill(table, entries);
    __syncthreads();
    for (int item = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; item < row_tiles * chunks; item += gridDim.x * (THREADS / 32)) {
        u32 words[D::WORDS];
        D::load(words, codes + (size_t)item * D::CHUNK_BYTES, lane);
        u32 *to = out + ((size_t)(item / chunks) * 16 + lane / 4) * stride + item % chunks * CHUNK * 8 + lane % 4;
#pragma unroll
        for (int tile = 0; tile < CHUNK; tile++, to += 8) {
            u32 a[4];
            D::decode(a, words, tile, lane, hash_unit, table);
            to[0] = a[0], to[8 * stride] = a[1], to[4] = a[2], to[8 * stride + 4] = a[3];
        }
    }
}
