"""A row of blocks of a trellis' codes on AVX2: `byte_trellis` with other instructions, the same integers.

There every half lane cuts its own 32 bits out of words. Here the 16-bit halves of all words are put side by side once,
those of a tile and of the tile four to its right, and a state is what three instructions make of two neighbours:
AVX2 has no shift across two registers, so that cutting twice costs more than memory in the nearest cache.
Sixteen registers do not hold the tables, which are loaded for 32 look-ups at a time. Hashes of a row come first and
wait in the nearest cache: from a state to a product is a long way, and while one waits for another a processor
has no place for enough instructions.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu import simd_avx2 as half_simd
from qpalette.backends.cpu.byte_activations import COLUMNS
from qpalette.backends.cpu.byte_rows import (
    LINE,
    ROWS,
    RowKernels,
    add_scaled,
    aligned,
    blocks_of_pair,
    place_of_decoded,
    place_of_sums,
)
from qpalette.backends.cpu.byte_trellis import ORDER
from qpalette.backends.cpu.jit import inlined, kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import LANES, TILE, prefetch_codes
from qpalette.backends.cpu.simd_avx2 import HALF
from qpalette.codes.description import LANE_WEIGHTS

_LANES_OF_TILE = TILE * TILE // LANE_WEIGHTS
_SHORTS = LINE // 2  # of a vector
_COUNT = 8  # int16 of a count
_STEPS = TILE  # pairs of weights, neighbours in a row, of two rows of a tile
_WINDOW = 16


@kernel
def windows_of(ends):  # type: ignore[no-untyped-def]
    """For each weight of a tile, int64 [256, 3]: where the older of the two vectors that its state is in lies, and the
    counts of both; and the counts, of 0 to 16."""
    plan = np.empty((_LANES_OF_TILE * LANE_WEIGHTS, 3), np.int64)
    half, step, start = LANE_WEIGHTS // 2, 0, 0
    for _ in range(2 * _LANES_OF_TILE):
        for _ in range(half):
            end = start + _WINDOW - ends[step & LANE_WEIGHTS - 1]
            plan[step, 0] = ((end >> 4) + 1) * _SHORTS  # two halves lie before the first
            plan[step, 1] = (end & _WINDOW - 1) * _COUNT
            plan[step, 2] = (_WINDOW - (end & _WINDOW - 1)) * _COUNT
            step += 1
        start = end
    counts = np.zeros((_WINDOW + 1, _COUNT), np.int16)
    counts[:, 0] = np.arange(_WINDOW + 1)
    return plan.reshape(-1), counts.reshape(-1)


@kernel
def tables_of(table):  # type: ignore[no-untyped-def]
    """128 magnitudes, then the 64 largest by their lowest two bits."""
    found = table[:192].copy()
    for place in range(64):
        found[128 + place % 4 * 16 + place // 4] = table[128 + place]
    return found


@kernel
def cut(codes, left, right, bits, first, last, halves):  # type: ignore[no-untyped-def]
    """Put the 16-bit halves of the words first .. last of the tiles from codes[left] and codes[right] on side by side;
    before the first word is the last one: the stream is a circle."""
    for word in range(first, last):
        at = (word if word >= 0 else bits - 1) * LANES
        one, other = simd.loadi(codes, left + at), simd.loadi(codes, right + at)
        place = 2 * (word + 1) * _SHORTS
        simd.store(halves, place, simd.high_halves(one, other))
        simd.store(halves, place + _SHORTS, simd.low_halves(one, other))


@lru_cache(maxsize=4)
def make_windows(way: str) -> RowKernels:
    """For a way of decoding."""
    has_tail = way == "hashed tail"

    @inlined
    def hashed(halves, plan, counts, numbers, step, half):  # type: ignore[no-untyped-def]
        """s (2 s + 1) << (16 - L) of the states s of a step, of half of the tiles."""
        place = half_simd.element(plan, 3 * step) + half
        older = half_simd.shift_left(half_simd.loadw(halves, place), counts, half_simd.element(plan, 3 * step + 1))
        newer = half_simd.shift_right(
            half_simd.loadw(halves, place + _SHORTS), counts, half_simd.element(plan, 3 * step + 2)
        )
        state = half_simd.orw(older, newer)
        doubled = half_simd.shift_left(state, counts, half_simd.element(numbers, 0) * _COUNT)
        return half_simd.mulw(state, half_simd.addw(doubled, half_simd.load_splatw(numbers, 1)))

    @kernel
    def hash_row(halves, plan, counts, numbers, row, hashes):  # type: ignore[no-untyped-def]
        """Of the weights of two rows of tiles, two at a time, for both halves of the tiles: a sign and seven bits below
        it; behind all of them, where there is a tail, what is below these."""
        for steps in range(_STEPS):
            for half in range(2):
                step, of_half = row * 2 * _STEPS + 2 * steps, half * _SHORTS // 2
                first = hashed(halves, plan, counts, numbers, step, of_half)
                second = hashed(halves, plan, counts, numbers, step + 1, of_half)
                at = (2 * steps + half) * HALF
                simd.store(hashes, at, half_simd.high_bytes(first, second))
                if has_tail:
                    simd.store(hashes, at + _STEPS * LINE, half_simd.low_bytes(first, second))

    @inlined
    def magnitudes(hashes, at, index, table):  # type: ignore[no-untyped-def]
        if has_tail:
            return half_simd.look_up_hashed_tail(table, index, half_simd.loady(hashes, at + _STEPS * LINE))
        return half_simd.look_up_hashed(table, index)

    @inlined
    def times(total, hashes, table, steps, half, x, at):  # type: ignore[no-untyped-def]
        place = (2 * steps + half) * HALF
        index = half_simd.loady(hashes, place)
        signed = half_simd.where_negative(index, half_simd.loady(x, at + COLUMNS * HALF), half_simd.loady(x, at))
        return half_simd.dot_magnitudes(total, magnitudes(hashes, place, index, table), signed)

    @kernel
    def multiply_one(codes, block_row, columns, size, vectors, sums, arrays):  # type: ignore[no-untyped-def]
        """The products of a row of blocks and one token, into `sums`."""
        _, _, ends, numbers, entries = arrays
        activations, scales, _ = vectors
        plan, counts = windows_of(ends)
        table, bits = tables_of(entries), size // LANES
        x, bytes_ = aligned(2 * COLUMNS * HALF), activations.view(np.int8)
        halves, hashes = aligned(2 * (bits + 1) * LINE).view(np.int16), aligned(2 * _STEPS * LINE)
        totals = aligned(2 * LINE).view(np.int32)
        sums[:] = np.float32(0)
        for pair in range((columns + 1) // 2):
            left, right = blocks_of_pair(block_row, columns, pair, size)
            cut(codes, left, right, bits, -1, bits, halves)
            for column in range(COLUMNS):
                each = half_simd.load_repeated(bytes_, (pair * COLUMNS + column) * LANES)
                simd.store(x, column * HALF, each)
                simd.store(x, (COLUMNS + column) * HALF, half_simd.negatey(each))
            scale = simd.load_quarterf(scales, pair * SIDE)
            for row in range(TILE // 2):
                prefetch_codes(codes, left, 2 * size, row)
                hash_row(halves, plan, counts, numbers, row, hashes)
                for half in range(2):
                    upper = half_simd.splatv(np.int32(0))
                    lower = upper
                    for quad in range(_STEPS // 4):
                        at = quad * HALF
                        upper = times(upper, hashes, table, 4 * quad, half, x, at)
                        lower = times(lower, hashes, table, 4 * quad + 1, half, x, at)
                        at += COLUMNS // 2 * HALF
                        upper = times(upper, hashes, table, 4 * quad + 2, half, x, at)
                        lower = times(lower, hashes, table, 4 * quad + 3, half, x, at)
                    simd.store(totals, half * LANES // 2, upper)
                    simd.store(totals, LANES + half * LANES // 2, lower)
                at = place_of_sums(row, 0, 1)
                add_scaled(sums, at, simd.loadi(totals, 0), scale)
                add_scaled(sums, at + LANES, simd.loadi(totals, LANES), scale)

    @kernel
    def decode_rows(codes, block_row, columns, size, first, pairs, row, decoded, masks, starts, arrays):  # type: ignore[no-untyped-def]
        """Rows of tiles `row`, `row` + 8 and the next of each, of `pairs` pairs of blocks from `first` on."""
        _, _, ends, numbers, entries = arrays
        plan, counts = windows_of(ends)
        table, bits = tables_of(entries), size // LANES
        halves, hashes = aligned(2 * (bits + 1) * LINE).view(np.int16), aligned(2 * _STEPS * LINE)
        start, stop = (4 * row * bits - _WINDOW) // 32, (4 * (row + 2) * bits + 31) // 32
        for pair in range(pairs):
            left, right = blocks_of_pair(block_row, columns, first + pair, size)
            cut(codes, left, right, bits, start, stop, halves)
            for below in range(2):
                prefetch_codes(codes, left, 2 * size, row + below)
                hash_row(halves, plan, counts, numbers, row + below, hashes)
                for steps in range(_STEPS):  # of two columns beside each other, those of a row and of the one 8 below
                    column = steps // 4 + steps % 4 // 2 * COLUMNS // 2
                    for half in range(2):
                        place = (2 * steps + half) * HALF
                        index = half_simd.loady(hashes, place)
                        weights = magnitudes(hashes, place, index, table)
                        at = place_of_decoded(pair, column, 2 * below + steps % 2) + half * HALF
                        simd.store(decoded, at, half_simd.even_magnitudes(weights, index))
                        simd.store(decoded, at + ROWS * LINE, half_simd.odd_magnitudes(weights, index))

    return RowKernels(multiply_one, decode_rows, ORDER, True)
