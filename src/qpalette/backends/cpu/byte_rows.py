"""What the kernels of products in bytes share: a row of blocks, its sums, and where all of it lies."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from qpalette.backends.cpu import instructions, simd
from qpalette.backends.cpu.byte_activations import COLUMNS
from qpalette.backends.cpu.decoders import HALVES
from qpalette.backends.cpu.jit import inlined
from qpalette.backends.cpu.matmul import LANES, TILE
from qpalette.backends.cpu.operands import pointer

LINE = 4 * LANES  # bytes of a vector
ROWS = 4  # rows of tiles that lie together: r, r + 8, r + 1, r + 9
SUMS = TILE * LANES  # of a token
_VECTORS = 2 if instructions.IN_SHORTS else 1  # of four columns of a row, decoded
DECODED = COLUMNS * _VECTORS * ROWS * LINE  # bytes of a pair of blocks


class RowKernels(NamedTuple):
    """What is done with a row of blocks, for a way of decoding.

    multiply_one: its products with one token. decode_rows: some rows of tiles, for several. order: of the columns of
    activations (`put_bytes`). has_signs: whether decoded weights are magnitudes with masks of those that are negative,
    else they are MIDDLE more than they stand for; as int16 (`short_products`) they have their signs.
    """

    multiply_one: Any
    decode_rows: Any
    order: np.ndarray
    has_signs: bool


@inlined
def aligned(count):  # type: ignore[no-untyped-def]
    """int8 [count], from the start of a cache line on: numba's own arrays would have every other vector on two."""
    space = np.empty(count + LINE, np.int8)
    start = -space.ctypes.data % LINE
    return space[start : start + count]


@inlined
def byte_arrays_of(matrix):  # type: ignore[no-untyped-def]
    """The fields of `Arrays`, as `ByteDecoder` has them."""
    return (
        carray(pointer(matrix.words), 2 * HALVES, np.int64),
        carray(pointer(matrix.turns), HALVES, np.int32),
        carray(pointer(matrix.ends), 8, np.int16),
        carray(pointer(matrix.numbers), 2, np.int16),
        carray(pointer(matrix.table), 8 * LINE, np.int8),
    )


@inlined
def blocks_of_pair(block_row, columns, pair, size):  # type: ignore[no-untyped-def]
    """Where the two blocks of a pair start; the last may be one alone, which is then multiplied by zeros, too."""
    left = (block_row * columns + 2 * pair) * size
    return left, left + size if 2 * pair + 1 < columns else left


@inlined
def place_of_decoded(pair, column, row):  # type: ignore[no-untyped-def]
    """Where four columns of a row of tiles lie; the second half of them, as int16, ROWS * LINE further on."""
    return ((pair * COLUMNS + column) * _VECTORS * ROWS + row) * LINE


@inlined
def place_of_sums(row, token, tokens):  # type: ignore[no-untyped-def]
    """Where sums [4 of two rows each, tokens, rows r, r + 8, r + 1, r + 9, lanes] of a row of tiles lie."""
    below = row % (TILE // 2)
    return ((below // 2 * tokens + token) * ROWS + 2 * (row % 2) + row // (TILE // 2)) * LANES


@inlined
def add_scaled(sums, at, integers, scale):  # type: ignore[no-untyped-def]
    simd.store(sums, at, simd.fmaf(simd.to_float(integers), scale, simd.loadf(sums, at)))


@inlined
def add_four(sums, at, integers, scale):  # type: ignore[no-untyped-def]
    add_scaled(sums, at, integers[0], scale)
    add_scaled(sums, at + LANES, integers[1], scale)
    add_scaled(sums, at + 2 * LANES, integers[2], scale)
    add_scaled(sums, at + 3 * LANES, integers[3], scale)
