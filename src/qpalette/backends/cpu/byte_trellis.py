"""A row of blocks of a trellis' codes, multiplied in bytes while it is decoded, or decoded for many tokens."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.byte_activations import COLUMNS
from qpalette.backends.cpu.byte_decoders import TRELLISES, byte_half_lane, registers
from qpalette.backends.cpu.byte_rows import LINE, ROWS, RowKernels, add_scaled, aligned, blocks_of_pair, place_of_sums
from qpalette.backends.cpu.decoders import HALVES
from qpalette.backends.cpu.jit import inlined, kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import LANES, TILE, prefetch_codes


@lru_cache(maxsize=4)
def make_trellis(way: str) -> RowKernels:
    """For a way of decoding."""
    decode = TRELLISES[way]

    @inlined
    def times(total, before, after, first, second, numbers, table, x, at):  # type: ignore[no-untyped-def]
        weights, signs = decode(before, after, first, second, numbers, table)
        minus = simd.loadb(x, at + COLUMNS * LINE)
        return simd.dot_magnitudes(total, weights, simd.where_negative(signs, minus, simd.loadb(x, at)))

    @kernel
    def multiply_one(codes, block_row, columns, size, vectors, sums, arrays):  # type: ignore[no-untyped-def]
        """The products of a row of blocks and one token, into `sums`."""
        words, turns, ends, multipliers, entries = arrays
        activations, scales, offsets = vectors
        splat, numbers, table = registers(ends, multipliers, entries)
        quads = len(ends) // 2  # no constant: unrolled, all loads of a row come first, and registers do not suffice
        x = aligned(2 * COLUMNS * LINE)  # a load that repeats 16 bytes waits for the same unit as a permutation
        sums[:] = np.float32(0)
        for pair in range((columns + 1) // 2):
            left, right = blocks_of_pair(block_row, columns, pair, size)
            for column in range(COLUMNS):
                each = simd.load_quarterb(activations, (pair * COLUMNS + column) * SIDE)
                simd.store(x, column * LINE, each)
                simd.store(x, (COLUMNS + column) * LINE, simd.negateb(each))
            for row in range(TILE // 2):
                prefetch_codes(codes, left, 2 * size, row)
                upper = simd.load_quarteri(offsets, pair * SIDE)
                lower = upper
                # A half lane is loaded while the one before it is multiplied: what a load leads to takes long.
                before, after = byte_half_lane(codes, left, right, 8 * row, words, turns)
                for quad in range(quads):
                    half, at = 8 * row + 2 * quad, quad * LINE
                    before_next, after_next = byte_half_lane(codes, left, right, half + 1, words, turns)
                    upper = times(upper, before, after, splat[0], splat[1], numbers, table, x, at)
                    lower = times(lower, before, after, splat[2], splat[3], numbers, table, x, at)
                    before, after = byte_half_lane(codes, left, right, (half + 2) % HALVES, words, turns)
                    at += COLUMNS // 2 * LINE
                    upper = times(upper, before_next, after_next, splat[4], splat[5], numbers, table, x, at)
                    lower = times(lower, before_next, after_next, splat[6], splat[7], numbers, table, x, at)
                scale = simd.load_quarterf(scales, pair * SIDE)
                at = place_of_sums(row, 0, 1)
                add_scaled(sums, at, upper, scale)
                add_scaled(sums, at + LANES, lower, scale)

    @inlined
    def put(decoded, masks, at, start, before, after, first, second, numbers, table):  # type: ignore[no-untyped-def]
        """-x is ~x + 1: what this leaves to the products is a bitwise operation, and the sum of the weights that are
        negative is what a sum starts with."""
        weights, signs = decode(before, after, first, second, numbers, table)
        simd.store(decoded, at, weights)
        mask = simd.ones_where_negative(signs)
        simd.store(masks, at, mask)
        return simd.dot_magnitudes(start, weights, simd.andb(mask, simd.splatb(np.int8(1))))

    @kernel
    def decode_rows(codes, block_row, columns, size, first, pairs, row, decoded, masks, starts, arrays):  # type: ignore[no-untyped-def]
        """Rows of tiles `row`, `row` + 8 and the next of each, of `pairs` pairs of blocks from `first` on."""
        words, turns, ends, multipliers, entries = arrays
        splat, numbers, table = registers(ends, multipliers, entries)
        quads = len(ends) // 2
        for pair in range(pairs):
            left, right = blocks_of_pair(block_row, columns, first + pair, size)
            for below in range(2):
                prefetch_codes(codes, left, 2 * size, row + below)
                upper, lower = simd.splati(np.int32(0)), simd.splati(np.int32(0))
                for quad in range(quads):
                    half = 8 * (row + below) + 2 * quad
                    at = ((pair * COLUMNS + quad) * ROWS + 2 * below) * LINE
                    before, after = byte_half_lane(codes, left, right, half, words, turns)
                    upper = put(decoded, masks, at, upper, before, after, splat[0], splat[1], numbers, table)
                    lower = put(decoded, masks, at + LINE, lower, before, after, splat[2], splat[3], numbers, table)
                    before, after = byte_half_lane(codes, left, right, half + 1, words, turns)
                    at += COLUMNS // 2 * ROWS * LINE
                    upper = put(decoded, masks, at, upper, before, after, splat[4], splat[5], numbers, table)
                    lower = put(decoded, masks, at + LINE, lower, before, after, splat[6], splat[7], numbers, table)
                simd.store(starts, (pair * ROWS + 2 * below) * LANES, upper)
                simd.store(starts, (pair * ROWS + 2 * below + 1) * LANES, lower)

    return RowKernels(multiply_one, decode_rows, ORDER, True)


# Of columns, as `put_bytes` takes it: two of a tile and the same two of the tile four to its right.
ORDER = (np.arange(COLUMNS)[:, None] * 2 + np.array([0, 1, TILE, TILE + 1])).reshape(-1)
