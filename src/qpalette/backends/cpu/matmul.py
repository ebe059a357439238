"""Decode-and-multiply: weights exist only in registers, sixteen tiles (4 x 4) at a time.

A matrix is cut into equal runs of blocks, its pieces, whatever the shape ("stream-K"): narrow matrices keep every core
busy. Each piece sums into its own rows; a last pass adds them and applies scales.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, prange

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.decoders import HALVES, WAYS
from qpalette.backends.cpu.jit import entry, get_num_threads, inlined, kernel, parallel_kernel, set_num_threads
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.operands import address_after, launch_at, matrix_at, pointer, read_values, write_values
from qpalette.backends.cpu.transform import Factors, half_multiplier, sign_multiplier, transform_row

LANES = simd.LANES
TILE = 16
BLOCK = SIDE * TILE  # rows, and columns, of a block
AHEAD = 4096  # words: 16 KB from what is read to what is asked for
LEAST_PRODUCTS = 1 << 17  # per thread: some 12 microseconds of work, several times what waking a thread costs


@lru_cache(maxsize=8)
def make_kernels(way: str) -> tuple[Any, Any]:
    """(linear, dequantize) for a way of decoding; the latter ends with the fields of `Arrays`."""
    lane_weights = WAYS[way]

    @kernel
    def multiply_block(codes, base, size, x, stride, column, sums, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        batch = x.size // stride
        for row in range(8):
            prefetch_codes(codes, base, size, row)
            for quad in range(4):
                w = lane_weights(codes, base, row * 4 + quad, words, turns, ends, numbers, table)
                for b in range(batch):
                    at = (b * TILE + row) * LANES
                    first = b * stride + (column * TILE + 2 * quad) * LANES
                    _accumulate(sums, at, x, first, w[0], w[1], w[4], w[5])
                    _accumulate(sums, at + 8 * LANES, x, first, w[2], w[3], w[6], w[7])

    @kernel
    def multiply_run(codes, x, start, stop, partial, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        """Add the products of blocks start .. stop, counted along the columns first, to `partial`."""
        columns, size = codes.shape[1], codes.shape[2] * LANES
        batch = x.shape[0]
        flat_codes, flat_x = codes.reshape(-1), x.reshape(-1)
        sums = np.zeros(batch * TILE * LANES, np.float32)
        for item in range(start, stop):
            column = item % columns
            multiply_block(
                flat_codes, item * size, size, flat_x, x.shape[1], column, sums, words, turns, ends, numbers, table
            )
            if column == columns - 1 or item == stop - 1:
                _flush(sums, partial, batch, item // columns, codes.shape[0] * BLOCK)

    @kernel
    def multiply_pieces(address, lanes, threads, worker, workers, partial):  # type: ignore[no-untyped-def]
        """What one of `workers` does: every so many pieces, over all matrices; each piece has sums of its own."""
        launch = launch_at(address)
        batch, columns = lanes.shape[0], blocks_across(launch)
        piece, place = 0, 0
        for member in range(launch.members):
            matrix = matrix_at(launch, member)
            pieces, blocks = pieces_of(launch, matrix, batch, threads), matrix.block_rows * columns
            size = batch * matrix.block_rows * BLOCK
            codes = carray(pointer(matrix.codes), (matrix.block_rows, columns, matrix.tile_words, LANES), np.int32)
            words, turns, ends, numbers, table = arrays_of(matrix)
            for part in range(pieces):
                if piece % workers == worker:
                    start, stop = blocks * part // pieces, blocks * (part + 1) // pieces
                    sums = partial[place : place + size]
                    multiply_run(codes, lanes, start, stop, sums, words, turns, ends, numbers, table)
                piece, place = piece + 1, place + size

    @parallel_kernel
    def multiply_in_parallel(address, lanes, threads, workers, partial):  # type: ignore[no-untyped-def]
        for worker in prange(workers):
            multiply_pieces(address, lanes, threads, worker, workers, partial)

    @entry(f"linear {way}")
    def linear(address, x, type_, batch, threads):  # type: ignore[no-untyped-def]
        """y[b, m] = scale[m] * sum_k weight[m, k] (Q s x_b)[k] for each matrix of the LAUNCH at `address`, all decoded
        this `way`; x, at an address, is [batch, K] of `type_`, and so are the results. `threads` at most are used.

        A matrix is cut as it would be alone, so that its results are the same bits in any company.
        """
        launch = launch_at(address)
        size, products = 0, 0
        for member in range(launch.members):
            matrix = matrix_at(launch, member)
            size += batch * matrix.block_rows * BLOCK * pieces_of(launch, matrix, batch, threads)
            products += batch * launch.features * matrix.rows
        lanes = _spread(rotate_input(launch, x, type_, batch, BLOCK))
        partial = np.zeros(size, np.float32)
        workers = min(threads, products // LEAST_PRODUCTS)
        if workers > 1:
            before = get_num_threads()
            set_num_threads(workers)
            multiply_in_parallel(address, lanes, threads, workers, partial)
            set_num_threads(before)
        else:
            multiply_pieces(address, lanes, threads, 0, 1, partial)
        finish(launch, type_, batch, threads, partial)

    @entry(f"dequantize {way}", parallel=True)
    def dequantize(codes, scales, out, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        """The rotated weight matrix: out float32 [M, K]; `scales` as stored."""
        columns, size = codes.shape[1], codes.shape[2] * LANES
        flat_codes = codes.reshape(-1)
        for item in prange(codes.shape[0] * columns):
            tiles = np.empty(TILE * TILE * LANES, np.float32)
            for lane in range(32):
                w = lane_weights(flat_codes, item * size, lane, words, turns, ends, numbers, table)
                at = ((lane // 4) * TILE + 2 * (lane % 4)) * LANES
                down = 8 * TILE * LANES
                simd.store(tiles, at, w[0])
                simd.store(tiles, at + LANES, w[1])
                simd.store(tiles, at + down, w[2])
                simd.store(tiles, at + down + LANES, w[3])
                simd.store(tiles, at + 8 * LANES, w[4])
                simd.store(tiles, at + 9 * LANES, w[5])
                simd.store(tiles, at + down + 8 * LANES, w[6])
                simd.store(tiles, at + down + 9 * LANES, w[7])
            _gather_block(tiles, item // columns * BLOCK, item % columns * BLOCK, scales, out)

    return linear, dequantize


@inlined
def prefetch_codes(codes, start, size, eighth):  # type: ignore[no-untyped-def]
    """Ask for an eighth of `size` words, AHEAD of those that start at codes[start]."""
    for line in range(size // LANES * eighth // 8, size // LANES * (eighth + 1) // 8):
        simd.prefetch(codes, start + AHEAD + line * LANES)


@inlined
def blocks_across(launch):  # type: ignore[no-untyped-def]
    return (launch.features + BLOCK - 1) // BLOCK


@inlined
def pieces_of(launch, matrix, batch, threads):  # type: ignore[no-untyped-def]
    """One for each of `threads`, but no more than have LEAST_PRODUCTS each."""
    return max(1, min(threads, batch * launch.features * matrix.rows // LEAST_PRODUCTS))


@inlined
def arrays_of(matrix):  # type: ignore[no-untyped-def]
    """The fields of `Arrays`; nothing reads the lengths, of which some depend on the code."""
    return (
        carray(pointer(matrix.words), 3 * HALVES, np.int64),
        carray(pointer(matrix.turns), HALVES, np.int32),
        carray(pointer(matrix.ends), 1, np.int32),
        carray(pointer(matrix.numbers), 1, np.int32),
        carray(pointer(matrix.table), 1, np.float32),
    )


@kernel
def input_transform(launch):  # type: ignore[no-untyped-def]
    """The input's diagonal, float32 [K], and its Factors: as `transform_row` takes them."""
    size = launch.features
    if launch.has_signs:
        multiplier = sign_multiplier(carray(pointer(launch.diagonal), (size + 7) // 8, np.uint8), size)
    else:
        multiplier = half_multiplier(carray(pointer(launch.diagonal), size, np.int16))
    factors = Factors(
        carray(pointer(launch.orders), launch.factors, np.int64),
        carray(pointer(launch.inners), launch.factors, np.int64),
        carray(pointer(launch.offsets), launch.factors, np.int64),
        carray(pointer(launch.matrices), launch.matrices_size, np.float32),
        np.float32(launch.scale),
    )
    return multiplier, factors


@kernel
def rotate_input(launch, x, type_, batch, width):  # type: ignore[no-untyped-def]
    """Q s x, float32 [batch, K up to a multiple of `width`]."""
    size = launch.features
    multiplier, factors = input_transform(launch)
    rotated, scratch = np.zeros((batch, (size + width - 1) // width * width), np.float32), np.empty(size, np.float32)
    for b in range(batch):
        row = rotated[b, :size]
        read_values(address_after(x, b * size, type_), type_, row)
        transform_row(row, multiplier, factors, scratch)
    return rotated


@kernel
def finish(launch, type_, batch, threads, partial):  # type: ignore[no-untyped-def]
    """Add the pieces of each matrix, apply the scales, and write the results."""
    place = 0
    for member in range(launch.members):
        matrix = matrix_at(launch, member)
        pieces, height = pieces_of(launch, matrix, batch, threads), matrix.block_rows * BLOCK
        scales = carray(pointer(matrix.scales), matrix.rows, np.int16)
        results = np.empty((batch, matrix.rows), np.float32)
        for b in range(batch):
            for m in range(matrix.rows):
                total = np.float32(0)
                for piece in range(pieces):
                    total += partial[place + (piece * batch + b) * height + m]
                results[b, m] = total * np.float32(matrix.step) * simd.half_to_float(scales[m])
        write_values(results.reshape(-1), type_, matrix.y)
        place += pieces * batch * height


@inlined
def _accumulate(sums, at, x, column, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    total = simd.loadf(sums, at)
    total = simd.fmaf(w0, simd.loadf(x, column), total)
    total = simd.fmaf(w1, simd.loadf(x, column + LANES), total)
    total = simd.fmaf(w2, simd.loadf(x, column + 8 * LANES), total)
    total = simd.fmaf(w3, simd.loadf(x, column + 9 * LANES), total)
    simd.store(sums, at, total)


@kernel
def _flush(sums, out, batch, block_row, out_rows):  # type: ignore[no-untyped-def]
    """Add the sums of a row of blocks, over its four columns of tiles, to `out` [batch * out_rows]."""
    for b in range(batch):
        for row in range(TILE):
            for down in range(SIDE):
                total = np.float32(0)
                for across in range(SIDE):
                    total += sums[(b * TILE + row) * LANES + down * SIDE + across]
                out[b * out_rows + block_row * BLOCK + down * TILE + row] += total
    sums[:] = np.float32(0)


@kernel
def _spread(rotated):  # type: ignore[no-untyped-def]
    """[batch, K] -> [batch, 4 K]: a column of a tile as the lanes want it, four tiles, four copies of each."""
    batch, size = rotated.shape
    lanes = np.empty((batch, size * SIDE), np.float32)
    for b in range(batch):
        for block in range(size // BLOCK):
            for k in range(TILE):
                for across in range(SIDE):
                    value = rotated[b, block * BLOCK + across * TILE + k]
                    for down in range(SIDE):
                        lanes[b, (block * TILE + k) * LANES + down * SIDE + across] = value
    return lanes


@kernel
def _gather_block(tiles, first_row, first_column, scales, out):  # type: ignore[no-untyped-def]
    """Write a block of sixteen tiles [row, column, lane] to its place in `out`, what lies outside left away."""
    for lane in range(LANES):
        top, left = first_row + lane // SIDE * TILE, first_column + lane % SIDE * TILE
        for row in range(min(TILE, out.shape[0] - top)):
            scale = simd.half_to_float(scales[top + row])
            for k in range(min(TILE, out.shape[1] - left)):
                out[top + row, left + k] = tiles[(row * TILE + k) * LANES + lane] * scale
