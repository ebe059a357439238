"""Rows of a packed matrix in the basis of the checkpoint, as an embedding reads them: only the lanes that hold a row
are decoded, then it is rotated back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.decoders import WAYS
from qpalette.backends.cpu.jit import entry, kernel
from qpalette.backends.cpu.layout import SIDE
from qpalette.backends.cpu.matmul import BLOCK, LANES, TILE, arrays_of, blocks_across, input_transform
from qpalette.backends.cpu.operands import launch_at, matrix_at, pointer
from qpalette.backends.cpu.transform import transform_rows


@lru_cache(maxsize=8)
def make_rows(way: str) -> Any:
    """(launch, ids, count, fault, .): y[i] = d Q^T scale W'[ids[i]], float32, of the one matrix of the LAUNCH, whose
    factors are those of Q^T; ids int64. Where an id is no row's, 1 is written at the address `fault`."""
    lane_weights = WAYS[way]

    @kernel
    def decode_row(launch, matrix, row, out):  # type: ignore[no-untyped-def]
        columns, size = blocks_across(launch), matrix.tile_words * LANES
        codes = carray(pointer(matrix.codes), matrix.block_rows * columns * size, np.int32)
        words, turns, ends, numbers, table = arrays_of(matrix)
        down, inside = row % BLOCK // TILE * SIDE, row % TILE
        lanes = np.empty(4 * LANES, np.float32)
        for column in range(columns):
            base = (row // BLOCK * columns + column) * size
            for quad in range(4):
                w = lane_weights(codes, base, inside % 8 * 4 + quad, words, turns, ends, numbers, table)
                upper = inside < 8
                simd.store(lanes, 0, w[0] if upper else w[2])
                simd.store(lanes, LANES, w[1] if upper else w[3])
                simd.store(lanes, 2 * LANES, w[4] if upper else w[6])
                simd.store(lanes, 3 * LANES, w[5] if upper else w[7])
                for across in range(SIDE):
                    at, tile = column * BLOCK + across * TILE + 2 * quad, down + across
                    out[at] = lanes[tile]
                    out[at + 1] = lanes[LANES + tile]
                    out[at + 8] = lanes[2 * LANES + tile]
                    out[at + 9] = lanes[3 * LANES + tile]

    @entry(f"rows {way}")
    def rows(address, ids, count, fault, unused):  # type: ignore[no-untyped-def]
        launch = launch_at(address)
        matrix, features = matrix_at(launch, 0), launch.features
        scales = carray(pointer(matrix.scales), matrix.rows, np.int16)
        wanted = carray(pointer(ids), count, np.int64)
        results = carray(pointer(matrix.y), (count, features), np.float32)
        multiplier, factors = input_transform(launch)
        decoded = np.empty((1, blocks_across(launch) * BLOCK), np.float32)
        same = np.ones(features, np.float32)
        for i in range(count):
            row = wanted[i]
            if row < 0 or row >= matrix.rows:
                carray(pointer(fault), 1, np.int64)[0] = 1
                continue
            decode_row(launch, matrix, row, decoded[0])
            scale = simd.half_to_float(scales[row])
            for k in range(features):
                decoded[0, k] *= scale
            transform_rows(decoded[:, :features], same, factors, results[i : i + 1])
            for k in range(features):
                results[i, k] *= multiplier[k]

    return rows
