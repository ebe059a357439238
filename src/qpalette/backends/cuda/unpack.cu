// A packed matrix decoded to float16, row by row, without its row scales, for batches where a library's matrix product wins.
//
// A warp decodes a chunk at a time. Columns lie in the order of a product's fragments (rotate.cu), as x' does then: so
// that a lane writes 16 bytes at once. Compile-time constants: THREADS, TABLE_BYTES, DECODERS (one type).

extern __shared__ __align__(16) u8 table[];

typedef DECODERS D;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
unpack(const u8 *codes, const u32 *entries, int row_tiles, int chunks, u32 hash_unit, uint4 *out) {
    const u32 lane = threadIdx.x % 32;
    const size_t stride = (size_t)chunks * CHUNK * 2;  // of a row of `out`
    D::fill(table, entries);
    __syncthreads();
    for (int item = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; item < row_tiles * chunks; item += gridDim.x * (THREADS / 32)) {
        u32 words[D::WORDS];
        D::load(words, codes + (size_t)item * D::CHUNK_BYTES, lane);
        uint4 *to = out + ((size_t)(item / chunks) * 16 + lane / 4) * stride + item % chunks * CHUNK * 2 + lane % 4;
#pragma unroll
        for (int tile = 0; tile < CHUNK; tile += 2, to += 4) {
            u32 a[4], b[4];
            D::decode(a, words, tile, lane, hash_unit, table);
            D::decode(b, words, tile + 1, lane, hash_unit, table);
            to[0] = make_uint4(a[0], a[2], b[0], b[2]);
            to[8 * stride] = make_uint4(a[1], a[3], b[1], b[3]);
        }
    }
}
