"""Decode-and-multiply in bytes: int8 activations, integer sums; for the codes of `byte_decoders`.

A unit of work is a row of blocks: 64 rows of a matrix over all its columns, two blocks at a time. Its sums are made in
one order, by one thread, so that results are the same bits whatever the number of threads. One token is multiplied
while weights are in registers. For more, four rows of tiles are decoded into the nearest cache and multiplied by four
tokens at once; each sum is made in the same order, so that a token's results are the same bits in any batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, get_num_threads, prange, set_num_threads

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.byte_activations import COLUMNS, PAIR, empty_bytes, put_bytes
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
    prefetch_codes,
    rotate_input,
)
from qpalette.backends.cpu.operands import address_after, launch_at, matrix_at, pointer, write_values

TOKENS = 4  # multiplied at once: with as many rows of tiles, sixteen sums in registers
LONGEST_PASS = 512  # tokens: their bytes of a chunk and their sums of four rows stay in the second cache
_ROWS = 4  # rows of tiles that are decoded together: r, r + 8, r + 1, r + 9
_CHUNK = 8  # pairs of blocks: 16 KB of weights and as much of signs stay in the first cache
_LINE = 4 * LANES  # bytes of a vector
_SUMS = TILE * LANES  # of a token


@lru_cache(maxsize=8)
def make_byte_kernel(way: str) -> Any:
    """linear, for a way of decoding."""
    decode, middle = WAYS[way]
    has_signs = middle == 0

    @inlined
    def times(total, before, after, first, second, numbers, table, x, at):  # type: ignore[no-untyped-def]
        weights, signs = decode(before, after, first, second, numbers, table)
        minus = simd.loadb(x, at + COLUMNS * _LINE)
        return simd.dot_bytes(total, weights, simd.where_negative(signs, minus, simd.loadb(x, at)))

    @kernel
    def multiply_one(codes, block_row, columns, size, vectors, sums, arrays):  # type: ignore[no-untyped-def]
        """The products of a row of blocks and one token, into `sums`."""
        words, turns, ends, multipliers, entries = arrays
        activations, scales, offsets = vectors
        splat, numbers, table = registers(ends, multipliers, entries)
        quads = len(ends) // 2  # no constant: unrolled, all loads of a row come first, and registers do not suffice
        x = aligned(2 * COLUMNS * _LINE)  # a load that repeats 16 bytes waits for the same unit as a permutation
        sums[:] = np.float32(0)
        for pair in range((columns + 1) // 2):
            left, right = _blocks(block_row, columns, pair, size)
            for column in range(COLUMNS):
                each = simd.load_quarterb(activations, (pair * COLUMNS + column) * SIDE)
                simd.store(x, column * _LINE, each)
                simd.store(x, (COLUMNS + column) * _LINE, simd.negateb(each))
            for row in range(TILE // 2):
                prefetch_codes(codes, left, 2 * size, row)
                upper = simd.load_quarteri(offsets, pair * SIDE)
                lower = upper
                for quad in range(quads):
                    half, at = 8 * row + 2 * quad, quad * _LINE
                    before, after = byte_half_lane(codes, left, right, half, words, turns)
                    upper = times(upper, before, after, splat[0], splat[1], numbers, table, x, at)
                    lower = times(lower, before, after, splat[2], splat[3], numbers, table, x, at)
                    before, after = byte_half_lane(codes, left, right, half + 1, words, turns)
                    at += COLUMNS // 2 * _LINE
                    upper = times(upper, before, after, splat[4], splat[5], numbers, table, x, at)
                    lower = times(lower, before, after, splat[6], splat[7], numbers, table, x, at)
                scale = simd.load_quarterf(scales, pair * SIDE)
                at = _sums_of(row, 0, 1)
                _add_scaled(sums, at, upper, scale)
                _add_scaled(sums, at + LANES, lower, scale)

    @inlined
    def put(decoded, masks, at, start, before, after, first, second, numbers, table):  # type: ignore[no-untyped-def]
        """-x is ~x + 1: what this leaves to the products is a bitwise operation, and the sum of the weights that are
        negative is what a sum starts with."""
        weights, signs = decode(before, after, first, second, numbers, table)
        simd.store(decoded, at, weights)
        if has_signs:
            mask = simd.ones_where_negative(signs)
            simd.store(masks, at, mask)
            start = simd.dot_bytes(start, weights, simd.andb(mask, simd.splatb(np.int8(1))))
        return start

    @kernel
    def decode_rows(codes, block_row, columns, size, first, pairs, row, decoded, masks, starts, arrays):  # type: ignore[no-untyped-def]
        """Rows of tiles `row`, `row` + 8 and the next of each, of `pairs` pairs of blocks from `first` on."""
        words, turns, ends, multipliers, entries = arrays
        splat, numbers, table = registers(ends, multipliers, entries)
        quads = len(ends) // 2
        for pair in range(pairs):
            left, right = _blocks(block_row, columns, first + pair, size)
            for below in range(2):
                prefetch_codes(codes, left, 2 * size, row + below)
                upper, lower = simd.splati(np.int32(0)), simd.splati(np.int32(0))
                for quad in range(quads):
                    half = 8 * (row + below) + 2 * quad
                    at = ((pair * COLUMNS + quad) * _ROWS + 2 * below) * _LINE
                    before, after = byte_half_lane(codes, left, right, half, words, turns)
                    upper = put(decoded, masks, at, upper, before, after, splat[0], splat[1], numbers, table)
                    lower = put(decoded, masks, at + _LINE, lower, before, after, splat[2], splat[3], numbers, table)
                    before, after = byte_half_lane(codes, left, right, half + 1, words, turns)
                    at += COLUMNS // 2 * _ROWS * _LINE
                    upper = put(decoded, masks, at, upper, before, after, splat[4], splat[5], numbers, table)
                    lower = put(decoded, masks, at + _LINE, lower, before, after, splat[6], splat[7], numbers, table)
                simd.store(starts, (pair * _ROWS + 2 * below) * LANES, upper)
                simd.store(starts, (pair * _ROWS + 2 * below + 1) * LANES, lower)

    @inlined
    def dot(total, decoded, masks, at, x_bytes):  # type: ignore[no-untyped-def]
        if has_signs:
            x_bytes = simd.xorb(x_bytes, simd.loadb(masks, at))
        return simd.dot_bytes(total, simd.loadb(decoded, at), x_bytes)

    @inlined
    def dots(totals, decoded, masks, at, x_bytes):  # type: ignore[no-untyped-def]
        """Of four rows and one token."""
        return (
            dot(totals[0], decoded, masks, at, x_bytes),
            dot(totals[1], decoded, masks, at + _LINE, x_bytes),
            dot(totals[2], decoded, masks, at + 2 * _LINE, x_bytes),
            dot(totals[3], decoded, masks, at + 3 * _LINE, x_bytes),
        )

    @kernel
    def multiply_decoded(decoded, masks, starts, first, pairs, tokens, vectors, sums, place):  # type: ignore[no-untyped-def]
        """Add the products of what `decode_rows` gave and all tokens to the sums from `place` on."""
        activations, scales, offsets = vectors
        for token in range(0, tokens, TOKENS):
            for pair in range(pairs):
                x = (first + pair) * tokens + token
                begin, x_of_token = pair * _ROWS * LANES, COLUMNS * SIDE
                a = _begun(starts, begin, simd.load_quarteri(offsets, x * SIDE))
                b = _begun(starts, begin, simd.load_quarteri(offsets, (x + 1) * SIDE))
                c = _begun(starts, begin, simd.load_quarteri(offsets, (x + 2) * SIDE))
                d = _begun(starts, begin, simd.load_quarteri(offsets, (x + 3) * SIDE))
                for column in range(COLUMNS):
                    at, at_x = (pair * COLUMNS + column) * _ROWS * _LINE, x * x_of_token + column * SIDE
                    a = dots(a, decoded, masks, at, simd.load_quarterb(activations, at_x))
                    b = dots(b, decoded, masks, at, simd.load_quarterb(activations, at_x + x_of_token))
                    c = dots(c, decoded, masks, at, simd.load_quarterb(activations, at_x + 2 * x_of_token))
                    d = dots(d, decoded, masks, at, simd.load_quarterb(activations, at_x + 3 * x_of_token))
                at = place + token * _ROWS * LANES
                _add_four(sums, at, a, simd.load_quarterf(scales, x * SIDE))
                _add_four(sums, at + _ROWS * LANES, b, simd.load_quarterf(scales, (x + 1) * SIDE))
                _add_four(sums, at + 2 * _ROWS * LANES, c, simd.load_quarterf(scales, (x + 2) * SIDE))
                _add_four(sums, at + 3 * _ROWS * LANES, d, simd.load_quarterf(scales, (x + 3) * SIDE))

    @kernel
    def multiply_some(codes, block_row, columns, size, tokens, vectors, sums, space, arrays):  # type: ignore[no-untyped-def]
        """The products of a row of blocks and `tokens` tokens, a multiple of TOKENS, into `sums`."""
        decoded, masks, starts = space
        pairs = (columns + 1) // 2
        sums[:] = np.float32(0)
        for first in range(0, pairs, _CHUNK):
            count = min(_CHUNK, pairs - first)
            for row in range(0, TILE // 2, 2):
                decode_rows(codes, block_row, columns, size, first, count, row, decoded, masks, starts, arrays)
                place = _sums_of(row, 0, tokens)
                multiply_decoded(decoded, masks, starts, first, count, tokens, vectors, sums, place)

    @kernel
    def multiply_units(address, vectors, type_, start_token, count, worker, workers):  # type: ignore[no-untyped-def]
        """What one of `workers` does with tokens from `start_token` on: neighbouring units, over all matrices."""
        launch = launch_at(address)
        columns, tokens = blocks_across(launch), padded(count)
        units = block_rows_of(launch)
        start, stop = units * worker // workers, units * (worker + 1) // workers
        sums = aligned(tokens * _SUMS * 4).view(np.float32)
        space = (
            aligned(_CHUNK * COLUMNS * _ROWS * _LINE),
            aligned(_CHUNK * COLUMNS * _ROWS * _LINE),
            aligned(_CHUNK * _ROWS * _LINE).view(np.int32),
        )
        unit = 0
        for member in range(launch.members):
            matrix = matrix_at(launch, member)
            size = matrix.tile_words * LANES
            codes = carray(pointer(matrix.codes), matrix.block_rows * columns * size, np.int32)
            arrays = byte_arrays_of(matrix)
            for row in range(max(0, start - unit), min(matrix.block_rows, stop - unit)):
                if tokens == 1:
                    multiply_one(codes, row, columns, size, vectors, sums, arrays)
                else:
                    multiply_some(codes, row, columns, size, tokens, vectors, sums, space, arrays)
                write_rows(matrix, row, sums, type_, start_token, count)
            unit += matrix.block_rows

    @kernel
    def round_units(address, x, type_, start_token, count, vectors, worker, workers):  # type: ignore[no-untyped-def]
        """What one of `workers` does to make `vectors` of `count` tokens from `start_token` on."""
        launch = launch_at(address)
        first, last = count * worker // workers, count * (worker + 1) // workers
        source = address_after(x, (start_token + first) * launch.features, type_)
        rotated = rotate_input(launch, source, type_, last - first, PAIR)
        put_bytes(rotated, middle, first, padded(count), vectors)

    @parallel_kernel
    def multiply_in_parallel(address, vectors, type_, start_token, count, workers):  # type: ignore[no-untyped-def]
        for worker in prange(workers):
            multiply_units(address, vectors, type_, start_token, count, worker, workers)

    @parallel_kernel
    def round_in_parallel(address, x, type_, start_token, count, vectors, workers):  # type: ignore[no-untyped-def]
        for worker in prange(workers):
            round_units(address, x, type_, start_token, count, vectors, worker, workers)

    @entry(f"linear in bytes {way}")
    def linear(address, x, type_, batch, threads):  # type: ignore[no-untyped-def]
        """As `matmul`'s, but for the rounding of weights and rotated activations to bytes."""
        launch = launch_at(address)
        pairs = (blocks_across(launch) + 1) // 2
        for start in range(0, batch, LONGEST_PASS):
            count = min(LONGEST_PASS, batch - start)
            workers = min(threads, count * launch.features * block_rows_of(launch) * BLOCK // LEAST_PRODUCTS)
            vectors = empty_bytes(padded(count), pairs)
            if workers > 1:
                before = get_num_threads()
                set_num_threads(workers)
                if count < TOKENS:  # not worth a start of threads
                    round_units(address, x, type_, start, count, vectors, 0, 1)
                else:
                    round_in_parallel(address, x, type_, start, count, vectors, workers)
                multiply_in_parallel(address, vectors, type_, start, count, workers)
                set_num_threads(before)
            else:
                round_units(address, x, type_, start, count, vectors, 0, 1)
                multiply_units(address, vectors, type_, start, count, 0, 1)

    return linear


@inlined
def padded(count):  # type: ignore[no-untyped-def]
    """Tokens that are multiplied: what is no multiple of TOKENS is filled up with zeros, but for a token alone."""
    return 1 if count == 1 else (count + TOKENS - 1) // TOKENS * TOKENS


@inlined
def aligned(count):  # type: ignore[no-untyped-def]
    """int8 [count], from the start of a cache line on: numba's own arrays would have every other vector on two."""
    space = np.empty(count + _LINE, np.int8)
    start = -space.ctypes.data % _LINE
    return space[start : start + count]


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


@inlined
def _blocks(block_row, columns, pair, size):  # type: ignore[no-untyped-def]
    """Where the two blocks of a pair start; the last may be one alone, which is then multiplied by zeros, too."""
    left = (block_row * columns + 2 * pair) * size
    return left, left + size if 2 * pair + 1 < columns else left


@inlined
def _sums_of(row, token, tokens):  # type: ignore[no-untyped-def]
    """Where sums [4 of two rows each, tokens, rows r, r + 8, r + 1, r + 9, lanes] of a row of tiles lie."""
    below = row % (TILE // 2)
    return ((below // 2 * tokens + token) * _ROWS + 2 * (row % 2) + row // (TILE // 2)) * LANES


@inlined
def _begun(starts, at, offset):  # type: ignore[no-untyped-def]
    return (
        simd.addi(simd.loadi(starts, at), offset),
        simd.addi(simd.loadi(starts, at + LANES), offset),
        simd.addi(simd.loadi(starts, at + 2 * LANES), offset),
        simd.addi(simd.loadi(starts, at + 3 * LANES), offset),
    )


@inlined
def _add_scaled(sums, at, integers, scale):  # type: ignore[no-untyped-def]
    simd.store(sums, at, simd.fmaf(simd.to_float(integers), scale, simd.loadf(sums, at)))


@inlined
def _add_four(sums, at, integers, scale):  # type: ignore[no-untyped-def]
    _add_scaled(sums, at, integers[0], scale)
    _add_scaled(sums, at + LANES, integers[1], scale)
    _add_scaled(sums, at + 2 * LANES, integers[2], scale)
    _add_scaled(sums, at + 3 * LANES, integers[3], scale)


@kernel
def write_rows(matrix, block_row, sums, type_, start_token, count):  # type: ignore[no-untyped-def]
    """The results of a row of blocks: sums over the four columns of tiles, scaled, for each of the 64 rows."""
    top, tokens = block_row * BLOCK, sums.size // _SUMS
    rows = min(BLOCK, matrix.rows - top)
    stored = carray(pointer(matrix.scales), matrix.rows, np.int16)
    scales, values = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for i in range(rows):
        scales[i] = simd.half_to_float(stored[top + i])
    for token in range(count):
        for row in range(0, TILE, 4):
            added = simd.quad_sums(
                simd.loadf(sums, _sums_of(row, token, tokens)),
                simd.loadf(sums, _sums_of(row + 1, token, tokens)),
                simd.loadf(sums, _sums_of(row + 2, token, tokens)),
                simd.loadf(sums, _sums_of(row + 3, token, tokens)),
            )
            simd.store_quarters(values, row, TILE, added)
        for i in range(BLOCK):
            values[i] = values[i] * np.float32(matrix.step) * scales[i]
        place = (start_token + token) * matrix.rows + top
        write_values(values[:rows], type_, address_after(matrix.y, place, type_))
