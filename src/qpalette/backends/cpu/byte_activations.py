"""Rotated activations as bytes: 255 steps of the largest of 32, and where `byte_matmul` reads them."""

from __future__ import annotations

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import BLOCK, TILE

PAIR = 2 * BLOCK  # columns
GROUP = PAIR // SIDE  # columns that share a scale: a tile's and those of the tile four to its right
COLUMNS = GROUP // 4  # words of a group
_MOST = np.float32(127)
_LEAST = np.float32(2.0**-119)  # of what is not taken for 0: _MOST over less overflows


@kernel
def empty_bytes(tokens, pairs):  # type: ignore[no-untyped-def]
    """Of `tokens` vectors that are 0: bytes, in int32 words; float32 scales; int32 offsets: all flat.

    For each 128 columns and token: eight words of four columns, for each the four tiles of the left block with those
    four to their right. And for each of the four tiles a scale, and
    what the sums begin with, -middle times the sum of its bytes. A group with an infinity or a NaN has one for a scale.
    """
    groups = tokens * pairs * SIDE
    return np.zeros(groups * COLUMNS, np.int32), np.zeros(groups, np.float32), np.zeros(groups, np.int32)


@kernel
def put_bytes(rotated, middle, order, first, tokens, vectors):  # type: ignore[no-untyped-def]
    """float32 [some of `tokens`, K, whole pairs of blocks], from token `first` on, into `vectors`. `order` says which
    of the 32 columns of a group is each byte of its eight words."""
    words, scales, offsets = vectors
    values = np.empty(2 * TILE, np.int32)
    flat, magnitude = rotated.reshape(-1), simd.splati(np.int32(0x7FFFFFFF))
    for token in range(len(rotated)):
        for group in range(rotated.shape[1] // GROUP):
            pair, across = group // SIDE, group % SIDE
            start = token * rotated.shape[1] + pair * PAIR + across * TILE
            place = (pair * tokens + first + token) * SIDE
            left, right = simd.loadf(flat, start), simd.loadf(flat, start + BLOCK)
            # As integers: the order is that of floats, and a NaN is above all.
            both = simd.maxi(
                simd.andi(simd.bits_of_float(left), magnitude), simd.andi(simd.bits_of_float(right), magnitude)
            )
            largest = simd.scalar_of_bits(simd.largest(both))
            inverse = simd.splatf(_MOST / largest if largest > _LEAST else np.float32(0))
            lows = simd.to_nearest(simd.mulf(left, inverse))
            highs = simd.to_nearest(simd.mulf(right, inverse))
            scales[place + across] = largest / _MOST
            offsets[place + across] = -middle * simd.total(simd.addi(lows, highs))
            simd.store(values, 0, lows)
            simd.store(values, TILE, highs)
            for column in range(COLUMNS):
                low = (values[order[4 * column]] & 0xFF) | (values[order[4 * column + 1]] & 0xFF) << 8
                high = (values[order[4 * column + 2]] & 0xFF) << 16 | values[order[4 * column + 3]] << 24
                words[(place * COLUMNS) + column * SIDE + across] = low | high
