"""Products of decoded weights and several tokens as int16, on AVX2: one multiplication and one addition for sixteen,
where bytes, whose pairs saturate, take five to nine instructions for 32. Sums are the same integers.

With sixteen registers, sums are those of a row of tiles and four tokens: eight registers, two of weights, four of
activations.
"""

from __future__ import annotations

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.byte_activations import COLUMNS
from qpalette.backends.cpu.byte_rows import LINE, ROWS, add_scaled, place_of_decoded
from qpalette.backends.cpu.jit import kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import LANES

TOKENS = 4
_OF_TOKEN = 2 * COLUMNS * SIDE  # words of two columns, of a pair of blocks


@kernel
def in_shorts(words):  # type: ignore[no-untyped-def]
    """The bytes of `empty_bytes` as int16, in int32 words: of each word its first and third byte, for the four tiles,
    then its second and fourth."""
    bytes_, shorts = words.view(np.int8), np.empty(2 * words.size, np.int32)
    flat = shorts.view(np.int8)
    for start in range(0, bytes_.size, LINE):  # eight words of four tiles are two vectors
        levels = simd.loadb(bytes_, start)
        simd.store_quarters(flat, 2 * start, LINE // 2, simd.even_levels(levels))
        simd.store_quarters(flat, 2 * start + LINE // 4, LINE // 2, simd.odd_levels(levels))
    return shorts


@kernel
def multiply_shorts(decoded, masks, starts, first, pairs, tokens, vectors, sums, place):  # type: ignore[no-untyped-def]
    """Add the products of what `decode_rows` gave and all tokens to the sums from `place` on."""
    activations, scales, _ = vectors
    of_token = ROWS * LANES
    for pair in range(pairs):
        for token in range(0, tokens, TOKENS):
            x = (first + pair) * tokens + token
            for row in range(ROWS):
                zero = simd.splati(np.int32(0))
                a, b, c, d = zero, zero, zero, zero
                for column in range(2 * COLUMNS):
                    weights = simd.loadb(decoded, place_of_decoded(pair, 0, row) + column * ROWS * LINE)
                    at = x * _OF_TOKEN + column * SIDE
                    a = simd.dot_shorts(a, weights, simd.load_quarterb(activations, at))
                    b = simd.dot_shorts(b, weights, simd.load_quarterb(activations, at + _OF_TOKEN))
                    c = simd.dot_shorts(c, weights, simd.load_quarterb(activations, at + 2 * _OF_TOKEN))
                    d = simd.dot_shorts(d, weights, simd.load_quarterb(activations, at + 3 * _OF_TOKEN))
                at = place + token * of_token + row * LANES
                add_scaled(sums, at, a, simd.load_quarterf(scales, x * SIDE))
                add_scaled(sums, at + of_token, b, simd.load_quarterf(scales, (x + 1) * SIDE))
                add_scaled(sums, at + 2 * of_token, c, simd.load_quarterf(scales, (x + 2) * SIDE))
                add_scaled(sums, at + 3 * of_token, d, simd.load_quarterf(scales, (x + 3) * SIDE))
