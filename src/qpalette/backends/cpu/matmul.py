"""Decode-and-multiply: weights exist only in registers, sixteen tiles (4 x 4) at a time.

Work is cut into equal runs of blocks, one run per thread, whatever the shape ("stream-K"): narrow matrices keep every
core busy. Each thread sums into its own rows; a last pass adds threads and applies scales.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import prange

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import kernel, parallel_kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.transform import transform_rows

LANES = simd.LANES
TILE = 16
BLOCK = SIDE * TILE  # rows, and columns, of a block


@lru_cache(maxsize=64)
def make_kernels(decode: Any, pattern: tuple[int, ...]) -> tuple[Any, Any]:
    """(linear, dequantize) for a decoder and the bits of each step of a lane: eight steps, or four of two weights."""
    words = sum(pattern)  # of a tile: 32 lanes of sum(pattern) bits each
    ends = tuple(int(end) for end in np.cumsum(pattern))

    @kernel
    def step(codes, base, end, parameters):  # type: ignore[no-untyped-def]
        """Weights of the step whose last stream bit is just before bit `end` of their tiles."""
        last = end - 1
        word = last >> 5
        older = word - 1 if word > 0 else words - 1  # the stream is a circle
        window = simd.funnel_shift_right(
            simd.loadi(codes, base + older * LANES),
            simd.loadi(codes, base + word * LANES),
            simd.splati(np.int32(31 - (last & 31))),
        )
        return decode(window, parameters)

    lane_weights = _eight_steps(step, words, *ends) if len(ends) == 8 else _four_steps(step, words, *ends)

    @kernel
    def accumulate(sums, at, x, column, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
        total = simd.loadf(sums, at)
        total = simd.fmaf(w0, simd.loadf(x, column), total)
        total = simd.fmaf(w1, simd.loadf(x, column + LANES), total)
        total = simd.fmaf(w2, simd.loadf(x, column + 8 * LANES), total)
        total = simd.fmaf(w3, simd.loadf(x, column + 9 * LANES), total)
        simd.store(sums, at, total)

    @kernel
    def multiply_block(codes, base, x, stride, column, sums, parameters):  # type: ignore[no-untyped-def]
        batch = x.size // stride
        for row in range(8):
            for quad in range(4):
                w = lane_weights(codes, base, row * 4 + quad, parameters)
                for b in range(batch):
                    at = (b * TILE + row) * LANES
                    first = b * stride + (column * TILE + 2 * quad) * LANES
                    accumulate(sums, at, x, first, w[0], w[1], w[4], w[5])
                    accumulate(sums, at + 8 * LANES, x, first, w[2], w[3], w[6], w[7])

    @kernel
    def flush(sums, out, batch, block_row, out_rows):  # type: ignore[no-untyped-def]
        """Add the sums of a row of blocks, over its four columns of tiles, to `out` [batch * out_rows]."""
        for b in range(batch):
            for row in range(TILE):
                for down in range(SIDE):
                    total = np.float32(0)
                    for across in range(SIDE):
                        total += sums[(b * TILE + row) * LANES + down * SIDE + across]
                    out[b * out_rows + block_row * BLOCK + down * TILE + row] += total
        sums[:] = np.float32(0)

    @kernel
    def multiply_run(codes, x, start, stop, partial, parameters):  # type: ignore[no-untyped-def]
        """Add the products of blocks start .. stop, counted along the columns first, to `partial`."""
        columns = codes.shape[1]
        batch = x.shape[0]
        flat_codes, flat_x = codes.reshape(-1), x.reshape(-1)
        sums = np.zeros(batch * TILE * LANES, np.float32)
        for item in range(start, stop):
            column = item % columns
            multiply_block(flat_codes, item * words * LANES, flat_x, x.shape[1], column, sums, parameters)
            if column == columns - 1 or item == stop - 1:
                flush(sums, partial, batch, item // columns, codes.shape[0] * BLOCK)

    @parallel_kernel
    def multiply_in_parallel(codes, x, threads, partial, parameters):  # type: ignore[no-untyped-def]
        blocks = codes.shape[0] * codes.shape[1]
        for thread in prange(threads):
            start, stop = blocks * thread // threads, blocks * (thread + 1) // threads
            multiply_run(codes, x, start, stop, partial[thread], parameters)

    @kernel
    def linear(x, signs, rotation, codes, scales, threads, out, parameters):  # type: ignore[no-untyped-def]
        """out[b, m] = scale[m] * sum_k weight[m, k] (Q s x_b)[k]; x float32 [batch, K], out float32 [batch, M].

        `signs` and `scales` are as stored; `rotation` as `transform_rows` takes it; `codes` laid out in lanes.
        """
        batch, rows = x.shape[0], codes.shape[0] * BLOCK
        rotated = np.zeros((batch, codes.shape[1] * BLOCK), np.float32)
        transform_rows(x, signs, rotation, rotated)
        lanes = _spread(rotated)
        partial = np.zeros((threads, batch * rows), np.float32)
        if threads == 1:
            multiply_run(codes, lanes, 0, codes.shape[0] * codes.shape[1], partial[0], parameters)
        else:
            multiply_in_parallel(codes, lanes, threads, partial, parameters)
        for b in range(batch):
            for m in range(out.shape[1]):
                total = np.float32(0)
                for thread in range(threads):
                    total += partial[thread, b * rows + m]
                out[b, m] = total * simd.half_to_float(scales[m])

    @parallel_kernel
    def dequantize(codes, scales, out, parameters):  # type: ignore[no-untyped-def]
        """The rotated weight matrix: out float32 [M, K]; `scales` as stored."""
        columns = codes.shape[1]
        flat_codes = codes.reshape(-1)
        for item in prange(codes.shape[0] * columns):
            tiles = np.empty(TILE * TILE * LANES, np.float32)
            for lane in range(32):
                w = lane_weights(flat_codes, item * words * LANES, lane, parameters)
                at = ((lane // 4) * TILE + 2 * (lane % 4)) * LANES
                down = 8 * TILE * LANES
                simd.store(tiles, at, w[0])
                simd.store(tiles, at + LANES, w[1])
                simd.store(tiles, at + down, w[2])
                simd.store(tiles, at + down + LANES, w[3])
                simd.store(tiles, at + 8 * LANES, w[4])
                simd.store(tiles, at + 9 * LANES, w[5])
                simd.store(tiles, at + down + 8 * LANES, w[6])
                simd.store(tiles, at + down + 9 * LANES, w[7])
            _gather_block(tiles, item // columns * BLOCK, item % columns * BLOCK, scales, out)

    return linear, dequantize


@kernel
def _spread(rotated):  # type: ignore[no-untyped-def]
    """[batch, K] -> [batch, 4 K]: a column of a tile as the lanes want it, four tiles, four copies of each."""
    batch, size = rotated.shape
    lanes = np.empty((batch, size * SIDE), np.float32)
    for b in range(batch):
        for block in range(size // BLOCK):
            for k in range(TILE):
                for across in range(SIDE):
                    value = rotated[b, block * BLOCK + across * TILE + k]
                    for down in range(SIDE):
                        lanes[b, (block * TILE + k) * LANES + down * SIDE + across] = value
    return lanes


@kernel
def _gather_block(tiles, first_row, first_column, scales, out):  # type: ignore[no-untyped-def]
    """Write a block of sixteen tiles [row, column, lane] to its place in `out`, what lies outside left away."""
    for lane in range(LANES):
        top, left = first_row + lane // SIDE * TILE, first_column + lane % SIDE * TILE
        for row in range(min(TILE, out.shape[0] - top)):
            scale = simd.half_to_float(scales[top + row])
            for k in range(min(TILE, out.shape[1] - left)):
                out[top + row, left + k] = tiles[(row * TILE + k) * LANES + lane] * scale


def _eight_steps(step: Any, words: int, c0: int, c1: int, c2: int, c3: int, c4: int, c5: int, c6: int, c7: int) -> Any:
    @kernel
    def lane_weights(codes, base, lane, parameters):  # type: ignore[no-untyped-def]
        """The eight weights of a scan-order lane: rows r and r + 8, columns c, c + 1, c + 8, c + 9 (pack.tiles)."""
        bit = lane * words
        return (
            step(codes, base, bit + c0, parameters),
            step(codes, base, bit + c1, parameters),
            step(codes, base, bit + c2, parameters),
            step(codes, base, bit + c3, parameters),
            step(codes, base, bit + c4, parameters),
            step(codes, base, bit + c5, parameters),
            step(codes, base, bit + c6, parameters),
            step(codes, base, bit + c7, parameters),
        )

    return lane_weights


def _four_steps(step: Any, words: int, c0: int, c1: int, c2: int, c3: int) -> Any:
    @kernel
    def lane_weights(codes, base, lane, parameters):  # type: ignore[no-untyped-def]
        """As above, from steps of two weights."""
        bit = lane * words
        w0, w1 = step(codes, base, bit + c0, parameters)
        w2, w3 = step(codes, base, bit + c1, parameters)
        w4, w5 = step(codes, base, bit + c2, parameters)
        w6, w7 = step(codes, base, bit + c3, parameters)
        return w0, w1, w2, w3, w4, w5, w6, w7

    return lane_weights
