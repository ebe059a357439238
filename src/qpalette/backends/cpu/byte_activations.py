"""Rotated activations as bytes: 255 steps of the largest of 32, and where `byte_matmul` reads them."""

from __future__ import annotations

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import inlined, kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import BLOCK, TILE

PAIR = 2 * BLOCK  # columns
GROUP = PAIR // SIDE  # columns that share a scale: a tile's and those of the tile four to its right
COLUMNS = GROUP // 4  # words of a group
LINE = 4 * simd.LANES  # bytes of a vector
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


def places_of(order: np.ndarray) -> np.ndarray:
    """Where `put_bytes` finds each of the 128 bytes of a token's pair of blocks, int8; `order` says which of the 32
    columns of a group is each byte of its eight words."""
    columns = order.reshape(COLUMNS, 1, 4)
    of_right = columns // TILE * LINE
    return (of_right + columns % TILE * SIDE + np.arange(SIDE).reshape(1, SIDE, 1)).reshape(-1).astype(np.int8)


@kernel
def put_bytes(rotated, middle, places, first, tokens, vectors):  # type: ignore[no-untyped-def]
    """float32 [some of `tokens`, K, whole pairs of blocks], from token `first` on, into `vectors`. `places` are those
    of `places_of`."""
    words, scales, offsets = vectors
    flat, bytes_ = rotated.reshape(-1), words.view(np.int8)
    front, back = simd.loadb(places, 0), simd.loadb(places, LINE)
    for token in range(len(rotated)):
        for pair in range(rotated.shape[1] // PAIR):
            start = token * rotated.shape[1] + pair * PAIR
            place = (pair * tokens + first + token) * SIDE
            a = _rounded(flat, start, middle, scales, offsets, place)
            b = _rounded(flat, start + TILE, middle, scales, offsets, place + 1)
            c = _rounded(flat, start + 2 * TILE, middle, scales, offsets, place + 2)
            d = _rounded(flat, start + 3 * TILE, middle, scales, offsets, place + 3)
            left, right = _four_bytes(a[0], b[0], c[0], d[0]), _four_bytes(a[1], b[1], c[1], d[1])
            simd.store(bytes_, 4 * place * COLUMNS, simd.lookup128(left, right, front))
            simd.store(bytes_, 4 * place * COLUMNS + LINE, simd.lookup128(left, right, back))


@inlined
def _rounded(flat, start, middle, scales, offsets, place):  # type: ignore[no-untyped-def]
    """A group, the columns of its left and of its right tile; its scale and offset are put in their places."""
    magnitude = simd.splati(np.int32(0x7FFFFFFF))
    left, right = simd.loadf(flat, start), simd.loadf(flat, start + BLOCK)
    # As integers: the order is that of floats, and a NaN is above all.
    both = simd.maxi(simd.andi(simd.bits_of_float(left), magnitude), simd.andi(simd.bits_of_float(right), magnitude))
    largest = simd.scalar_of_bits(simd.largest(both))
    inverse = simd.splatf(_MOST / largest if largest > _LEAST else np.float32(0))
    lows, highs = simd.to_nearest(simd.mulf(left, inverse)), simd.to_nearest(simd.mulf(right, inverse))
    scales[place] = largest / _MOST
    if middle != 0:
        offsets[place] = -middle * simd.total(simd.addi(lows, highs))
    return lows, highs


@inlined
def _four_bytes(a, b, c, d):  # type: ignore[no-untyped-def]
    """The lowest byte of each lane of the four, side by side."""
    return simd.low_bytes(simd.low_halves(a, c), simd.low_halves(b, d))
