"""Decode-and-multiply in bytes: int8 activations, integer sums; for the codes of `byte_decoders`.

A unit of work is a row of blocks: 64 rows of a matrix over all its columns, two blocks at a time. Its sums are made in
one order, by one thread, so that results are the same bits whatever the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, get_num_threads, prange, set_num_threads

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.byte_decoders import WAYS, byte_half_lane, registers
from qpalette.backends.cpu.decoders import HALVES
from qpalette.backends.cpu.jit import entry, inlined, kernel, parallel_kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import (
    BLOCK,
    LANES,
    LEAST_PRODUCTS,
    TILE,
    blocks_across,
    finish,
    prefetch_codes,
    rotate_input,
)
from qpalette.backends.cpu.operands import launch_at, matrix_at, pointer

PAIR = 2 * BLOCK  # columns
GROUP = PAIR // SIDE  # columns that share a scale: a tile's and those of the tile four to its right
_VECTORS = 16  # of bytes in two rows of tiles, r and r + 8
_LINE = 4 * LANES  # bytes of a vector
_MOST = np.float32(127)
_LEAST = np.float32(2.0**-119)  # of what is not taken for 0: _MOST over less overflows
_ROWS = TILE * LANES  # sums of a token


@lru_cache(maxsize=4)
def make_byte_kernel(way: str) -> Any:
    """linear, for a way of decoding."""
    decode, middle = WAYS[way]

    @inlined
    def put(decoded, signs, at, before, after, first, second, numbers, table):  # type: ignore[no-untyped-def]
        weights, sign = decode(before, after, first, second, numbers, table)
        simd.store(decoded, at, weights)
        if middle == 0:
            simd.store(signs, at, sign)

    @inlined
    def multiplied(decoded, signs, at, activations, total):  # type: ignore[no-untyped-def]
        if middle == 0:
            activations = simd.negate_where_negative(simd.loadb(signs, at), activations)
        return simd.dot_bytes(total, simd.loadb(decoded, at), activations)

    @kernel
    def multiply_rows(codes, block_row, columns, size, x, sums, arrays):  # type: ignore[no-untyped-def]
        """The products of a row of blocks, float32 [batch, 16 rows, lanes], into `sums`."""
        words, turns, ends, numbers, entries = arrays
        activations, scales, offsets = x
        splat, table = registers(ends, entries)
        batch, pairs = sums.size // _ROWS, (columns + 1) // 2
        decoded, signs = np.empty(_VECTORS * _LINE, np.int8), np.empty(_VECTORS * _LINE, np.int8)
        sums[:] = np.float32(0)
        for pair in range(pairs):
            left = (block_row * columns + 2 * pair) * size
            right = left + size if 2 * pair + 1 < columns else left  # or again: multiplied by zeros
            for row in range(TILE // 2):
                prefetch_codes(codes, left, 2 * size, row)
                for quad in range(4):
                    half, at = 8 * row + 2 * quad, 2 * quad * _LINE
                    before, after = byte_half_lane(codes, left, right, half, words, turns)
                    put(decoded, signs, at, before, after, splat[0], splat[1], numbers, table)
                    put(decoded, signs, at + _LINE, before, after, splat[2], splat[3], numbers, table)
                    before, after = byte_half_lane(codes, left, right, half + 1, words, turns)
                    at += _VECTORS // 2 * _LINE
                    put(decoded, signs, at, before, after, splat[4], splat[5], numbers, table)
                    put(decoded, signs, at + _LINE, before, after, splat[6], splat[7], numbers, table)
                for token in range(batch):
                    place = token * pairs + pair
                    upper = simd.load_quarteri(offsets, place * SIDE)
                    lower = upper
                    for column in range(_VECTORS // 2):
                        x_bytes = simd.load_quarterb(activations, (place * _VECTORS // 2 + column) * SIDE)
                        at = 2 * column * _LINE
                        upper = multiplied(decoded, signs, at, x_bytes, upper)
                        lower = multiplied(decoded, signs, at + _LINE, x_bytes, lower)
                    scale = simd.load_quarterf(scales, place * SIDE)
                    at = token * _ROWS + row * LANES
                    _add_scaled(sums, at, upper, scale)
                    _add_scaled(sums, at + _ROWS // 2, lower, scale)

    @kernel
    def multiply_units(address, x, batch, worker, workers, results):  # type: ignore[no-untyped-def]
        """What one of `workers` does: neighbouring units, over all matrices."""
        launch = launch_at(address)
        columns = blocks_across(launch)
        units = block_rows_of(launch)
        start, stop = units * worker // workers, units * (worker + 1) // workers
        sums = np.empty(batch * _ROWS, np.float32)
        first, place = 0, 0  # of a matrix, among units and results
        for member in range(launch.members):
            matrix = matrix_at(launch, member)
            size = matrix.tile_words * LANES
            codes = carray(pointer(matrix.codes), matrix.block_rows * columns * size, np.int32)
            arrays = byte_arrays_of(matrix)
            for row in range(max(0, start - first), min(matrix.block_rows, stop - first)):
                multiply_rows(codes, row, columns, size, x, sums, arrays)
                _add_lanes(sums, results, place + row * BLOCK, matrix.block_rows * BLOCK)
            first += matrix.block_rows
            place += batch * matrix.block_rows * BLOCK

    @parallel_kernel
    def multiply_in_parallel(address, x, batch, workers, results):  # type: ignore[no-untyped-def]
        for worker in prange(workers):
            multiply_units(address, x, batch, worker, workers, results)

    @entry(f"linear in bytes {way}")
    def linear(address, x, type_, batch, threads):  # type: ignore[no-untyped-def]
        """As `matmul`'s, but for the rounding of weights and rotated activations to bytes."""
        launch = launch_at(address)
        products = 0
        for member in range(launch.members):
            products += batch * launch.features * matrix_at(launch, member).rows
        vectors = to_bytes(rotate_input(launch, x, type_, batch, PAIR), middle)
        results = np.empty(batch * block_rows_of(launch) * BLOCK, np.float32)
        workers = min(threads, products // LEAST_PRODUCTS)
        if workers > 1:
            before = get_num_threads()
            set_num_threads(workers)
            multiply_in_parallel(address, vectors, batch, workers, results)
            set_num_threads(before)
        else:
            multiply_units(address, vectors, batch, 0, 1, results)
        finish(launch, type_, batch, 1, results)

    return linear


@inlined
def block_rows_of(launch):  # type: ignore[no-untyped-def]
    total = 0
    for member in range(launch.members):
        total += matrix_at(launch, member).block_rows
    return total


@inlined
def byte_arrays_of(matrix):  # type: ignore[no-untyped-def]
    """The fields of `Arrays`, as `ByteDecoder` has them."""
    return (
        carray(pointer(matrix.words), 2 * HALVES, np.int64),
        carray(pointer(matrix.turns), HALVES, np.int32),
        carray(pointer(matrix.ends), 8, np.int16),
        carray(pointer(matrix.numbers), 2, np.int16),
        carray(pointer(matrix.table), 8 * _LINE, np.int8),
    )


@kernel
def to_bytes(rotated, middle):  # type: ignore[no-untyped-def]
    """float32 [batch, K, whole pairs of blocks] -> bytes, in int32 words; float32 scales; int32 offsets: all flat.

    For each token and 128 columns: eight pairs of columns of a tile, for each the four tiles of the left block, for
    each a word of its two columns and those of the tile four to its right. And for each of the four tiles a scale, and
    what the sums begin with, -middle times the sum of its bytes. A group with an infinity or a NaN has one for a scale.
    """
    batch, size = rotated.shape
    pairs = size // PAIR
    words, values = np.empty(batch * size // 4, np.int32), np.empty(2 * TILE, np.int32)
    scales, offsets = np.empty(batch * pairs * SIDE, np.float32), np.empty(batch * pairs * SIDE, np.int32)
    flat, magnitude = rotated.reshape(-1), simd.splati(np.int32(0x7FFFFFFF))
    for place in range(batch * pairs):
        for across in range(SIDE):
            start = place * PAIR + across * TILE
            left, right = simd.loadf(flat, start), simd.loadf(flat, start + BLOCK)
            # As integers: the order is that of floats, and a NaN is above all.
            both = simd.maxi(
                simd.andi(simd.bits_of_float(left), magnitude), simd.andi(simd.bits_of_float(right), magnitude)
            )
            largest = simd.scalar_of_bits(simd.largest(both))
            inverse = simd.splatf(_MOST / largest if largest > _LEAST else np.float32(0))
            first = simd.to_nearest(simd.mulf(left, inverse))
            second = simd.to_nearest(simd.mulf(right, inverse))
            scales[place * SIDE + across] = largest / _MOST
            offsets[place * SIDE + across] = -middle * simd.total(simd.addi(first, second))
            simd.store(values, 0, first)
            simd.store(values, TILE, second)
            for column in range(0, TILE, 2):
                low = (values[column] & 0xFF) | (values[column + 1] & 0xFF) << 8
                high = (values[TILE + column] & 0xFF) << 16 | values[TILE + column + 1] << 24
                words[place * PAIR // 4 + column // 2 * SIDE + across] = low | high
    return words, scales, offsets


@inlined
def _add_scaled(sums, at, integers, scale):  # type: ignore[no-untyped-def]
    simd.store(sums, at, simd.fmaf(simd.to_float(integers), scale, simd.loadf(sums, at)))


@kernel
def _add_lanes(sums, results, place, stride):  # type: ignore[no-untyped-def]
    """The sums of four columns of tiles, for each of the 64 rows; `stride` from token to token."""
    for token in range(sums.size // _ROWS):
        for row in range(TILE):
            for down in range(SIDE):
                at = token * _ROWS + row * LANES + down * SIDE
                total = (sums[at] + sums[at + 1]) + (sums[at + 2] + sums[at + 3])
                results[place + token * stride + down * TILE + row] = total
