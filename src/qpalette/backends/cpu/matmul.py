"""Decode-and-multiply: weights exist only in registers, sixteen tile rows at a time.

Work is cut into equal runs of (row group, tile column) items, one run per thread, whatever the shape ("stream-K"):
narrow matrices keep every core busy. Each thread sums into its own rows; a last pass adds threads and applies scales.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import get_num_threads, prange

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import kernel, parallel_kernel

LANES = simd.LANES
TILE = 16


@lru_cache(maxsize=64)
def make_kernels(decode: Any, pattern: tuple[int, ...]) -> tuple[Any, Any]:
    """(multiply, dequantize) for a decoder and the bits of each step of a lane: eight steps, or four of two weights."""
    words = sum(pattern)  # of a tile: 32 lanes of sum(pattern) bits each
    ends = tuple(int(end) for end in np.cumsum(pattern))

    @kernel
    def step(codes, base, width, end, parameters):  # type: ignore[no-untyped-def]
        """Weights of the step whose last stream bit is just before bit `end` of their tiles."""
        last = end - 1
        word = last >> 5
        older = word - 1 if word > 0 else words - 1  # the stream is a circle
        window = simd.funnel_shift_right(
            simd.loadi(codes, base + older * width),
            simd.loadi(codes, base + word * width),
            simd.splati(np.int32(31 - (last & 31))),
        )
        return decode(window, parameters)

    lane_weights = _eight_steps(step, words, *ends) if len(ends) == 8 else _four_steps(step, words, *ends)

    @kernel
    def accumulate(sums, at, x, column, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
        total = simd.loadf(sums, at)
        total = simd.fmaf(w0, simd.load_splatf(x, column), total)
        total = simd.fmaf(w1, simd.load_splatf(x, column + 1), total)
        total = simd.fmaf(w2, simd.load_splatf(x, column + 8), total)
        total = simd.fmaf(w3, simd.load_splatf(x, column + 9), total)
        simd.store(sums, at, total)

    @kernel
    def multiply_tiles(codes, base, width, x, stride, column, sums, parameters):  # type: ignore[no-untyped-def]
        batch = x.size // stride
        for row in range(8):
            for quad in range(4):
                w = lane_weights(codes, base, width, row * 4 + quad, parameters)
                for b in range(batch):
                    at = (b * TILE + row) * LANES
                    first = b * stride + column + 2 * quad
                    accumulate(sums, at, x, first, w[0], w[1], w[4], w[5])
                    accumulate(sums, at + 8 * LANES, x, first, w[2], w[3], w[6], w[7])

    @kernel
    def flush(sums, out, batch, group, width, out_rows):  # type: ignore[no-untyped-def]
        """Lane l, row r of the group is output row (16 group + l) * 16 + r."""
        for b in range(batch):
            for row in range(TILE):
                for lane in range(width):
                    out[b * out_rows + (group * LANES + lane) * TILE + row] += sums[(b * TILE + row) * LANES + lane]
        sums[:] = np.float32(0)

    @parallel_kernel
    def multiply(codes, rows, columns, x, scales, out, parameters):  # type: ignore[no-untyped-def]
        """out[b, m] = scales[m] * sum_k weight[m, k] x[b, k]; x float32 [batch, 16 columns], out [batch, M]."""
        batch = x.shape[0]
        flat = x.reshape(-1)
        groups = (rows + LANES - 1) // LANES
        items = groups * columns
        threads = min(get_num_threads(), items)
        partial = np.zeros((threads, batch * rows * TILE), np.float32)
        for thread in prange(threads):
            sums = np.zeros(batch * TILE * LANES, np.float32)
            stop = items * (thread + 1) // threads
            for item in range(items * thread // threads, stop):
                group, column = item // columns, item % columns
                width = min(LANES, rows - group * LANES)
                base = (group * LANES * columns + column * width) * words
                multiply_tiles(codes, base, width, flat, x.shape[1], column * TILE, sums, parameters)
                if column == columns - 1 or item == stop - 1:
                    flush(sums, partial[thread], batch, group, width, rows * TILE)
        for b in range(batch):
            for m in range(out.shape[1]):
                total = np.float32(0)
                for thread in range(threads):
                    total += partial[thread, b * rows * TILE + m]
                out[b, m] = total * scales[m]

    @parallel_kernel
    def dequantize(codes, rows, columns, scales, out, parameters):  # type: ignore[no-untyped-def]
        """The rotated weight matrix: out float32 [M, K]."""
        groups = (rows + LANES - 1) // LANES
        for item in prange(groups * columns):
            group, column = item // columns, item % columns
            width = min(LANES, rows - group * LANES)
            base = (group * LANES * columns + column * width) * words
            tile = np.empty(TILE * TILE * LANES, np.float32)
            for lane in range(32):
                w = lane_weights(codes, base, width, lane, parameters)
                at = ((lane // 4) * TILE + 2 * (lane % 4)) * LANES
                down = 8 * TILE * LANES
                simd.store(tile, at, w[0])
                simd.store(tile, at + LANES, w[1])
                simd.store(tile, at + down, w[2])
                simd.store(tile, at + down + LANES, w[3])
                simd.store(tile, at + 8 * LANES, w[4])
                simd.store(tile, at + 9 * LANES, w[5])
                simd.store(tile, at + down + 8 * LANES, w[6])
                simd.store(tile, at + down + 9 * LANES, w[7])
            for lane in range(width):
                for row in range(TILE):
                    m = (group * LANES + lane) * TILE + row
                    if m < out.shape[0]:
                        for k in range(min(TILE, out.shape[1] - column * TILE)):
                            out[m, column * TILE + k] = tile[(row * TILE + k) * LANES + lane] * scales[m]

    return multiply, dequantize


def _eight_steps(step: Any, words: int, c0: int, c1: int, c2: int, c3: int, c4: int, c5: int, c6: int, c7: int) -> Any:
    @kernel
    def lane_weights(codes, base, width, lane, parameters):  # type: ignore[no-untyped-def]
        """The eight weights of a scan-order lane: rows r and r + 8, columns c, c + 1, c + 8, c + 9 (pack.tiles)."""
        bit = lane * words
        return (
            step(codes, base, width, bit + c0, parameters),
            step(codes, base, width, bit + c1, parameters),
            step(codes, base, width, bit + c2, parameters),
            step(codes, base, width, bit + c3, parameters),
            step(codes, base, width, bit + c4, parameters),
            step(codes, base, width, bit + c5, parameters),
            step(codes, base, width, bit + c6, parameters),
            step(codes, base, width, bit + c7, parameters),
        )

    return lane_weights


def _four_steps(step: Any, words: int, c0: int, c1: int, c2: int, c3: int) -> Any:
    @kernel
    def lane_weights(codes, base, width, lane, parameters):  # type: ignore[no-untyped-def]
        """As above, from steps of two weights."""
        bit = lane * words
        w0, w1 = step(codes, base, width, bit + c0, parameters)
        w2, w3 = step(codes, base, width, bit + c1, parameters)
        w4, w5 = step(codes, base, width, bit + c2, parameters)
        w6, w7 = step(codes, base, width, bit + c3, parameters)
        return w0, w1, w2, w3, w4, w5, w6, w7

    return lane_weights
