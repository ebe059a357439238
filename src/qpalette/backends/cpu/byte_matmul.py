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
from numba import carray, prange

from qpalette.backends.cpu import instructions, simd
from qpalette.backends.cpu.byte_activations import COLUMNS, PAIR, empty_bytes, places_of, put_bytes
from qpalette.backends.cpu.byte_decoders import FIELDS
from qpalette.backends.cpu.byte_fields import make_fields
from qpalette.backends.cpu.byte_rows import (
    DECODED,
    LINE,
    ROWS,
    SUMS,
    RowKernels,
    add_four,
    aligned,
    byte_arrays_of,
    place_of_sums,
)
from qpalette.backends.cpu.byte_trellis import make_trellis
from qpalette.backends.cpu.byte_windows import make_windows
from qpalette.backends.cpu.jit import entry, get_num_threads, inlined, kernel, parallel_kernel, set_num_threads
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import (
    BLOCK,
    LANES,
    LEAST_PRODUCTS,
    TILE,
    blocks_across,
    input_transform,
)
from qpalette.backends.cpu.operands import address_after, launch_at, matrix_at, pointer, read_values, write_values
from qpalette.backends.cpu.short_products import TOKENS, in_shorts, multiply_shorts
from qpalette.backends.cpu.transform import transform_row

LONGEST_PASS = 512  # tokens: their bytes of a chunk and their sums of four rows stay in the second cache
_CHUNK = (1 << 14) // DECODED  # pairs of blocks: 16 KB of weights and as much of signs stay in the first cache


def row_kernels(way: str) -> RowKernels:
    """Of a `ByteDecoder`."""
    if way in FIELDS:
        return make_fields(way)
    return make_windows(way) if instructions.IN_SHORTS else make_trellis(way)


@lru_cache(maxsize=16)
def make_byte_kernel(way: str) -> Any:
    """linear, for a way of decoding."""
    multiply_one, decode_rows, order, has_signs = row_kernels(way)
    middle, places = 0 if has_signs else instructions.MIDDLE, places_of(order)

    @inlined
    def dot(total, decoded, masks, at, x_bytes):  # type: ignore[no-untyped-def]
        if has_signs:
            x_bytes = simd.xorb(x_bytes, simd.loadb(masks, at))
            return simd.dot_magnitudes(total, simd.loadb(decoded, at), x_bytes)
        return simd.dot_levels(total, simd.loadb(decoded, at), x_bytes)

    @inlined
    def dots(totals, decoded, masks, at, x_bytes):  # type: ignore[no-untyped-def]
        """Of four rows and one token."""
        return (
            dot(totals[0], decoded, masks, at, x_bytes),
            dot(totals[1], decoded, masks, at + LINE, x_bytes),
            dot(totals[2], decoded, masks, at + 2 * LINE, x_bytes),
            dot(totals[3], decoded, masks, at + 3 * LINE, x_bytes),
        )

    @kernel
    def multiply_bytes(decoded, masks, starts, first, pairs, tokens, vectors, sums, place):  # type: ignore[no-untyped-def]
        """Add the products of what `decode_rows` gave and all tokens to the sums from `place` on. Tokens are the
        inner loop: a compiler would hold a token's sums over several pairs, for which there are no registers."""
        activations, scales, offsets = vectors
        x_of_token, of_token = COLUMNS * SIDE, ROWS * LANES
        for pair in range(pairs):
            begin = pair * ROWS * LANES
            for token in range(0, tokens, TOKENS):
                x = (first + pair) * tokens + token
                a = _begun(starts, begin, simd.load_quarteri(offsets, x * SIDE))
                b = _begun(starts, begin, simd.load_quarteri(offsets, (x + 1) * SIDE))
                c = _begun(starts, begin, simd.load_quarteri(offsets, (x + 2) * SIDE))
                d = _begun(starts, begin, simd.load_quarteri(offsets, (x + 3) * SIDE))
                for column in range(COLUMNS):
                    at, at_x = (pair * COLUMNS + column) * ROWS * LINE, x * x_of_token + column * SIDE
                    a = dots(a, decoded, masks, at, simd.load_quarterb(activations, at_x))
                    b = dots(b, decoded, masks, at, simd.load_quarterb(activations, at_x + x_of_token))
                    c = dots(c, decoded, masks, at, simd.load_quarterb(activations, at_x + 2 * x_of_token))
                    d = dots(d, decoded, masks, at, simd.load_quarterb(activations, at_x + 3 * x_of_token))
                at = place + token * of_token
                add_four(sums, at, a, simd.load_quarterf(scales, x * SIDE))
                add_four(sums, at + of_token, b, simd.load_quarterf(scales, (x + 1) * SIDE))
                add_four(sums, at + 2 * of_token, c, simd.load_quarterf(scales, (x + 2) * SIDE))
                add_four(sums, at + 3 * of_token, d, simd.load_quarterf(scales, (x + 3) * SIDE))

    multiply_decoded = multiply_shorts if instructions.IN_SHORTS else multiply_bytes

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
                place = place_of_sums(row, 0, tokens)
                multiply_decoded(decoded, masks, starts, first, count, tokens, vectors, sums, place)

    @kernel
    def multiply_units(address, vectors, type_, start_token, count, worker, workers):  # type: ignore[no-untyped-def]
        """What one of `workers` does with tokens from `start_token` on: neighbouring units, over all matrices."""
        launch = launch_at(address)
        columns, tokens = blocks_across(launch), padded(count)
        units = block_rows_of(launch)
        start, stop = units * worker // workers, units * (worker + 1) // workers
        sums = aligned(tokens * SUMS * 4).view(np.float32)
        space = (
            aligned(_CHUNK * DECODED),
            aligned(_CHUNK * DECODED),
            aligned(_CHUNK * ROWS * LINE).view(np.int32),
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
        multiplier, factors = input_transform(launch)
        scratch = np.empty(launch.features, np.float32)
        rotated = np.zeros((1, (launch.features + PAIR - 1) // PAIR * PAIR), np.float32)
        for token in range(first, last):  # each while it is in the nearest cache
            source = address_after(x, (start_token + token) * launch.features, type_)
            row = rotated[0, : launch.features]
            read_values(source, type_, row)
            transform_row(row, multiplier, factors, scratch)
            put_bytes(rotated, middle, places, token, padded(count), vectors)

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
                multiply_in_parallel(address, multiplied(vectors, count), type_, start, count, workers)
                set_num_threads(before)
            else:
                round_units(address, x, type_, start, count, vectors, 0, 1)
                multiply_units(address, multiplied(vectors, count), type_, start, count, 0, 1)

    return linear


@inlined
def padded(count):  # type: ignore[no-untyped-def]
    """Tokens that are multiplied: what is no multiple of TOKENS is filled up with zeros, but for a token alone."""
    return 1 if count == 1 else (count + TOKENS - 1) // TOKENS * TOKENS


@inlined
def multiplied(vectors, count):  # type: ignore[no-untyped-def]
    """`vectors` as `multiply_units` takes them."""
    words, scales, offsets = vectors
    if instructions.IN_SHORTS and count > 1:
        words = in_shorts(words)
    return words, scales, offsets


@inlined
def block_rows_of(launch):  # type: ignore[no-untyped-def]
    total = 0
    for member in range(launch.members):
        total += matrix_at(launch, member).block_rows
    return total


@inlined
def _begun(starts, at, offset):  # type: ignore[no-untyped-def]
    return (
        simd.addi(simd.loadi(starts, at), offset),
        simd.addi(simd.loadi(starts, at + LANES), offset),
        simd.addi(simd.loadi(starts, at + 2 * LANES), offset),
        simd.addi(simd.loadi(starts, at + 3 * LANES), offset),
    )


@kernel
def write_rows(matrix, block_row, sums, type_, start_token, count):  # type: ignore[no-untyped-def]
    """The results of a row of blocks: sums over the four columns of tiles, scaled, for each of the 64 rows."""
    top, tokens = block_row * BLOCK, sums.size // SUMS
    rows = min(BLOCK, matrix.rows - top)
    stored = carray(pointer(matrix.scales), matrix.rows, np.int16)
    scales, values = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for i in range(rows):
        scales[i] = simd.half_to_float(stored[top + i])
    for token in range(count):
        for row in range(0, TILE, 4):
            added = simd.quad_sums(
                simd.loadf(sums, place_of_sums(row, token, tokens)),
                simd.loadf(sums, place_of_sums(row + 1, token, tokens)),
                simd.loadf(sums, place_of_sums(row + 2, token, tokens)),
                simd.loadf(sums, place_of_sums(row + 3, token, tokens)),
            )
            simd.store_quarters(values, row, TILE, added)
        for i in range(BLOCK):
            values[i] = values[i] * np.float32(matrix.step) * scales[i]
        place = (start_token + token) * matrix.rows + top
        write_values(values[:rows], type_, address_after(matrix.y, place, type_))
