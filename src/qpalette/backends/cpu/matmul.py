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
from qpalette.backends.cpu.decoders import WAYS, half_lane
from qpalette.backends.cpu.jit import entry, inlined, kernel, parallel_kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.transform import sign_multiplier, transform_rows

LANES = simd.LANES
TILE = 16
BLOCK = SIDE * TILE  # rows, and columns, of a block


@lru_cache(maxsize=8)
def make_kernels(way: str) -> tuple[Any, Any]:
    """(linear, dequantize) for a way of decoding; both end with the fields of `Arrays`."""
    two_weights = WAYS[way]

    @inlined
    def lane_weights(codes, base, lane, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        """The eight weights of a scan-order lane: rows r and r + 8, columns c, c + 1, c + 8, c + 9 (codes.tiles)."""
        before, after = half_lane(codes, base, 2 * lane, words, turns)
        w0, w1 = two_weights(before, after, 0, ends, numbers, table)
        w2, w3 = two_weights(before, after, 1, ends, numbers, table)
        before, after = half_lane(codes, base, 2 * lane + 1, words, turns)
        w4, w5 = two_weights(before, after, 2, ends, numbers, table)
        w6, w7 = two_weights(before, after, 3, ends, numbers, table)
        return w0, w1, w2, w3, w4, w5, w6, w7

    @kernel
    def multiply_block(codes, base, x, stride, column, sums, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        batch = x.size // stride
        for row in range(8):
            for quad in range(4):
                w = lane_weights(codes, base, row * 4 + quad, words, turns, ends, numbers, table)
                for b in range(batch):
                    at = (b * TILE + row) * LANES
                    first = b * stride + (column * TILE + 2 * quad) * LANES
                    _accumulate(sums, at, x, first, w[0], w[1], w[4], w[5])
                    _accumulate(sums, at + 8 * LANES, x, first, w[2], w[3], w[6], w[7])

    @kernel
    def multiply_run(codes, x, start, stop, partial, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        """Add the products of blocks start .. stop, counted along the columns first, to `partial`."""
        columns, size = codes.shape[1], codes.shape[2] * LANES
        batch = x.shape[0]
        flat_codes, flat_x = codes.reshape(-1), x.reshape(-1)
        sums = np.zeros(batch * TILE * LANES, np.float32)
        for item in range(start, stop):
            column = item % columns
            multiply_block(
                flat_codes, item * size, flat_x, x.shape[1], column, sums, words, turns, ends, numbers, table
            )
            if column == columns - 1 or item == stop - 1:
                _flush(sums, partial, batch, item // columns, codes.shape[0] * BLOCK)

    @parallel_kernel
    def multiply_in_parallel(codes, x, threads, partial, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        blocks = codes.shape[0] * codes.shape[1]
        for thread in prange(threads):
            start, stop = blocks * thread // threads, blocks * (thread + 1) // threads
            multiply_run(codes, x, start, stop, partial[thread], words, turns, ends, numbers, table)

    @entry(f"linear {way}")
    def linear(x, signs, rotation, codes, scales, threads, out, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        """out[b, m] = scale[m] * sum_k weight[m, k] (Q s x_b)[k]; x float32 [batch, K], out float32 [batch, M].

        `signs` and `scales` are as stored; `rotation` as `transform_rows` takes it; `codes` laid out in lanes.
        """
        batch, rows = x.shape[0], codes.shape[0] * BLOCK
        rotated = np.zeros((batch, codes.shape[1] * BLOCK), np.float32)
        transform_rows(x, sign_multiplier(signs, x.shape[1]), rotation, rotated)
        lanes = _spread(rotated)
        partial = np.zeros((threads, batch * rows), np.float32)
        if threads == 1:
            multiply_run(
                codes, lanes, 0, codes.shape[0] * codes.shape[1], partial[0], words, turns, ends, numbers, table
            )
        else:
            multiply_in_parallel(codes, lanes, threads, partial, words, turns, ends, numbers, table)
        for b in range(batch):
            for m in range(out.shape[1]):
                total = np.float32(0)
                for thread in range(threads):
                    total += partial[thread, b * rows + m]
                out[b, m] = total * simd.half_to_float(scales[m])

    @entry(f"dequantize {way}", parallel=True)
    def dequantize(codes, scales, out, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        """The rotated weight matrix: out float32 [M, K]; `scales` as stored."""
        columns, size = codes.shape[1], codes.shape[2] * LANES
        flat_codes = codes.reshape(-1)
        for item in prange(codes.shape[0] * columns):
            tiles = np.empty(TILE * TILE * LANES, np.float32)
            for lane in range(32):
                w = lane_weights(flat_codes, item * size, lane, words, turns, ends, numbers, table)
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


@inlined
def _accumulate(sums, at, x, column, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    total = simd.loadf(sums, at)
    total = simd.fmaf(w0, simd.loadf(x, column), total)
    total = simd.fmaf(w1, simd.loadf(x, column + LANES), total)
    total = simd.fmaf(w2, simd.loadf(x, column + 8 * LANES), total)
    total = simd.fmaf(w3, simd.loadf(x, column + 9 * LANES), total)
    simd.store(sums, at, total)


@kernel
def _flush(sums, out, batch, block_row, out_rows):  # type: ignore[no-untyped-def]
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
