"""A row of blocks of codes in `fields`, multiplied in bytes while it is decoded, or decoded for many tokens."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qpalette.backends.cpu import instructions, simd
from qpalette.backends.cpu.byte_activations import COLUMNS
from qpalette.backends.cpu.byte_decoders import FIELDS
from qpalette.backends.cpu.byte_rows import (
    LINE,
    ROWS,
    RowKernels,
    add_four,
    blocks_of_pair,
    place_of_decoded,
    place_of_sums,
)
from qpalette.backends.cpu.fields import UNIT, planes_of
from qpalette.backends.cpu.jit import inlined, kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import LANES, TILE, prefetch_codes

_OF_BLOCK = COLUMNS // 2  # vectors of activations: four columns of each of its four columns of tiles


@lru_cache(maxsize=16)
def make_fields(way: str) -> RowKernels:
    """For indices of one width, of one weight or two."""
    width, weights = FIELDS[way]
    bits, words, targets = zip(*planes_of(width), strict=True)
    planes = len(bits)
    units = 2 // weights  # of the rows that lie together
    of_row = _OF_BLOCK // weights  # vectors of indices

    @inlined
    def field(codes, start, vector, plane):  # type: ignore[no-untyped-def]
        """A plane of a vector's indices, at its place in each byte; other bits are anything."""
        word = simd.loadi(codes, start + (words[plane] + vector * bits[plane] // 8) * LANES)
        right = vector * bits[plane] % 8 - targets[plane]
        lowered = simd.shri(word, simd.splati(np.int32(max(right, 0))))
        return simd.shli(lowered, simd.splati(np.int32(max(-right, 0))))

    @inlined
    def merged(below, above, target):  # type: ignore[no-untyped-def]
        mask = np.int32(((1 << target) - 1) * 0x01010101)
        return simd.ori(simd.andi(below, simd.splati(mask)), simd.andi(above, simd.splati(~mask)))

    @inlined
    def indices(codes, start, vector):  # type: ignore[no-untyped-def]
        found = field(codes, start, vector, 0)
        if planes > 1:
            found = merged(found, field(codes, start, vector, 1), targets[1])
        if planes > 2:
            found = merged(found, field(codes, start, vector, 2), targets[2])
        return simd.bytes_of_words(found)

    @inlined
    def look_up(table, first, index):  # type: ignore[no-untyped-def]
        """What is above an index is not masked: tables repeat."""
        if width <= 4:
            return simd.lookup16(table[first], index)
        if width <= 6:
            return simd.lookup64(table[first], index)
        low = simd.lookup128(table[first], table[first + 1], index)
        if width == 7:
            return low
        return simd.where_negative(index, simd.lookup128(table[first + 2], table[first + 3], index), low)

    @inlined
    def registers(entries):  # type: ignore[no-untyped-def]
        return (
            simd.loadb(entries, 0),
            simd.loadb(entries, LINE),
            simd.loadb(entries, 2 * LINE),
            simd.loadb(entries, 3 * LINE),
            simd.loadb(entries, 4 * LINE),
            simd.loadb(entries, 5 * LINE),
            simd.loadb(entries, 6 * LINE),
            simd.loadb(entries, 7 * LINE),
        )

    @inlined
    def times(total, codes, start, row, x, table):  # type: ignore[no-untyped-def]
        """The products of row `row` of those that lie together and a block's columns, added to `total`."""
        for part in range(of_row):
            vector = row * of_row + part
            index = indices(codes, start + vector // UNIT * width * LANES, vector % UNIT)
            total = simd.dot_levels(total, look_up(table, 0, index), x[part * weights])
            if weights == 2:
                total = simd.dot_levels(total, look_up(table, 4, index), x[part * weights + 1])
        return total

    @inlined
    def vectors_of(activations, at):  # type: ignore[no-untyped-def]
        return (
            simd.load_quarterb(activations, at),
            simd.load_quarterb(activations, at + SIDE),
            simd.load_quarterb(activations, at + 2 * SIDE),
            simd.load_quarterb(activations, at + 3 * SIDE),
        )

    @kernel
    def multiply_one(codes, block_row, columns, size, vectors, sums, arrays):  # type: ignore[no-untyped-def]
        """The products of a row of blocks and one token, into `sums`."""
        activations, scales, offsets = vectors
        table = registers(arrays[4])
        sums[:] = np.float32(0)
        for pair in range((columns + 1) // 2):
            left, right = blocks_of_pair(block_row, columns, pair, size)
            x = vectors_of(activations, pair * COLUMNS * SIDE)
            y = vectors_of(activations, (pair * COLUMNS + _OF_BLOCK) * SIDE)
            begin, scale = simd.load_quarteri(offsets, pair * SIDE), simd.load_quarterf(scales, pair * SIDE)
            for row in range(0, TILE // 2, 2):
                prefetch_codes(codes, left, 2 * size, row)
                prefetch_codes(codes, left, 2 * size, row + 1)
                at = row // 2 * units * width * LANES
                totals = (
                    times(times(begin, codes, left + at, 0, x, table), codes, right + at, 0, y, table),
                    times(times(begin, codes, left + at, 1, x, table), codes, right + at, 1, y, table),
                    times(times(begin, codes, left + at, 2, x, table), codes, right + at, 2, y, table),
                    times(times(begin, codes, left + at, 3, x, table), codes, right + at, 3, y, table),
                )
                add_four(sums, place_of_sums(row, 0, 1), totals, scale)

    @inlined
    def store_levels(decoded, at, levels):  # type: ignore[no-untyped-def]
        if instructions.IN_SHORTS:
            simd.store(decoded, at, simd.even_levels(levels))
            simd.store(decoded, at + ROWS * LINE, simd.odd_levels(levels))
        else:
            simd.store(decoded, at, levels)

    @inlined
    def put(codes, start, pair, first, decoded, table):  # type: ignore[no-untyped-def]
        """Decode the rows that lie together, of a block whose columns are those from `first` on of a pair's."""
        for row in range(ROWS):
            for part in range(of_row):
                vector = row * of_row + part
                index = indices(codes, start + vector // UNIT * width * LANES, vector % UNIT)
                column = first + part * weights
                store_levels(decoded, place_of_decoded(pair, column, row), look_up(table, 0, index))
                if weights == 2:
                    store_levels(decoded, place_of_decoded(pair, column + 1, row), look_up(table, 4, index))

    @kernel
    def decode_rows(codes, block_row, columns, size, first, pairs, row, decoded, masks, starts, arrays):  # type: ignore[no-untyped-def]
        """Rows of tiles `row`, `row` + 8 and the next of each, of `pairs` pairs of blocks from `first` on. There are no
        signs, and sums start with 0."""
        table = registers(arrays[4])
        starts[:] = 0
        at = row // 2 * units * width * LANES
        for pair in range(pairs):
            left, right = blocks_of_pair(block_row, columns, first + pair, size)
            prefetch_codes(codes, left, 2 * size, row)
            prefetch_codes(codes, left, 2 * size, row + 1)
            put(codes, left + at, pair, 0, decoded, table)
            put(codes, right + at, pair, _OF_BLOCK, decoded, table)

    return RowKernels(multiply_one, decode_rows, _order(weights), False)


def _order(weights: int) -> np.ndarray:
    """Of columns, as `put_bytes` takes it: four indices of one row are the four bytes of a word."""
    of_block = np.arange(TILE).reshape(-1, 4, weights).swapaxes(1, 2).reshape(-1)
    return np.concatenate([of_block, TILE + of_block])
