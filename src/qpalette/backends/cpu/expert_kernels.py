"""What the experts of a layer are made of: a plan of the slots, rotations, products of runs of slots, gate and sum.

A slot is one of the k places of a token, and holds an expert or none. Whatever is done for a slot is done in an order
that does not depend on the others: rows of a matrix are cut among threads, never its columns, and a slot's products are
summed apart from those beside it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, prange

from qpalette.backends.cpu.calls import call
from qpalette.backends.cpu.jit import entry, kernel, parallel_kernel
from qpalette.backends.cpu.matmul import BLOCK, LEAST_PRODUCTS
from qpalette.backends.cpu.operands import MATRIX, TYPES, pointer
from qpalette.backends.cpu.simd import LANES
from qpalette.backends.cpu.transform import half_multiplier, sign_multiplier, transform_rows

LONGEST_RUN = 16  # slots that a product takes at once
PIECES = 4  # of a projection, for each thread: the last to end is then not late
LEAST_VALUES = 1 << 15  # per thread, of what costs some nanoseconds each
FLOAT32 = next(number for dtype, number in TYPES.items() if dtype.itemsize == 4)


@entry("experts plan")
def plan(index, experts):  # type: ignore[no-untyped-def]
    """For `index` int64 [slots]: the slots that hold an expert, by expert, int64; and runs of them, int64 [., 3]: the
    expert, the first place, how many."""
    starts = np.zeros(experts + 1, np.int64)
    for expert in index:
        if 0 <= expert < experts:
            starts[expert + 1] += 1
    runs = 0
    for expert in range(experts):
        runs += (starts[expert + 1] + LONGEST_RUN - 1) // LONGEST_RUN
        starts[expert + 1] += starts[expert]
    table, run = np.empty((runs, 3), np.int64), 0
    for expert in range(experts):
        for start in range(starts[expert], starts[expert + 1], LONGEST_RUN):
            table[run, 0] = expert
            table[run, 1] = start
            table[run, 2] = min(LONGEST_RUN, starts[expert + 1] - start)
            run += 1
    slots = np.empty(starts[experts], np.int64)
    for slot in range(index.size):
        expert = index[slot]
        if 0 <= expert < experts:
            slots[starts[expert]] = slot
            starts[expert] += 1
    return slots, table


@kernel
def _rotate_some(x, sources, diagonals, has_signs, factors, out, worker, workers):  # type: ignore[no-untyped-def]
    size = x.shape[1]
    for row in range(worker, len(sources), workers):
        if has_signs[row]:
            multiplier = sign_multiplier(carray(pointer(diagonals[row]), (size + 7) // 8, np.uint8), size)
        else:
            multiplier = half_multiplier(carray(pointer(diagonals[row]), size, np.int16))
        source = sources[row]
        transform_rows(x[source : source + 1], multiplier, factors, out[row : row + 1])


@parallel_kernel
def _rotate_in_parallel(x, sources, diagonals, has_signs, factors, out, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):
        _rotate_some(x, sources, diagonals, has_signs, factors, out, worker, workers)


@entry("experts rotate")
def rotate(x, sources, diagonals, has_signs, factors, out, threads):  # type: ignore[no-untyped-def]
    """out[i] = Q d_i x[sources[i]], float32 [., K]; `diagonals` int64, their addresses: of packed signs, or float16."""
    workers = min(threads, out.size // LEAST_VALUES)
    if workers > 1:
        _rotate_in_parallel(x, sources, diagonals, has_signs, factors, out, workers)
    else:
        _rotate_some(x, sources, diagonals, has_signs, factors, out, 0, 1)


@kernel
def _multiply_piece(template, matrix, linear, x, start, stop, out, first, column):  # type: ignore[no-untyped-def]
    """Block rows start .. stop of `matrix`, whose results begin at `column`, by x: as a matrix of its own."""
    launch, cut, top = template.copy(), np.empty(1, MATRIX), start * BLOCK
    rows = min(matrix.rows, stop * BLOCK) - top
    across = (launch[0].features + BLOCK - 1) // BLOCK
    results = np.empty((len(x), rows), np.float32)
    cut[0] = matrix
    cut[0].codes += 4 * start * across * matrix.tile_words * LANES
    cut[0].scales += 2 * top
    cut[0].block_rows = stop - start
    cut[0].rows = rows
    cut[0].y = results.ctypes.data
    launch[0].multiplied = cut.ctypes.data
    call(linear, launch.ctypes.data, x.ctypes.data, FLOAT32, len(x), 1)
    out[first : first + len(x), column + top : column + top + rows] = results


@kernel
def _multiply_some(template, matrices, linears, runs, x, out, pieces, worker, workers):  # type: ignore[no-untyped-def]
    item = 0
    for run in range(len(runs)):
        expert, first, count = runs[run]
        column, rows = 0, x[first : first + count]
        for part in range(matrices.shape[1]):
            matrix = matrices[expert, part]
            cuts = min(pieces, matrix.block_rows)
            for cut in range(cuts):
                if item % workers == worker:
                    start, stop = matrix.block_rows * cut // cuts, matrix.block_rows * (cut + 1) // cuts
                    linear = linears[expert, part]
                    _multiply_piece(template, matrix, linear, rows, start, stop, out, first, column)
                item += 1
            column += matrix.rows


@parallel_kernel
def _multiply_in_parallel(template, matrices, linears, runs, x, out, pieces, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):
        _multiply_some(template, matrices, linears, runs, x, out, pieces, worker, workers)


@entry("experts products")
def products(template, matrices, linears, runs, x, out, threads):  # type: ignore[no-untyped-def]
    """out float32 [slots, M]: rows of x float32 [slots, K], rotated already, by the matrices of the run's expert,
    MATRIX [E, parts], with the kernels at the addresses `linears` [E, parts]. `template` is a LAUNCH of K inputs that
    rotates nothing."""
    workers = min(threads, x.size * out.shape[1] // LEAST_PRODUCTS)
    if workers > 1:
        pieces = max(1, PIECES * workers // (len(runs) * matrices.shape[1]))
        _multiply_in_parallel(template, matrices, linears, runs, x, out, pieces, workers)
    else:
        _multiply_some(template, matrices, linears, runs, x, out, 1, 0, 1)


SILU, GELU, GELU_TANH, RELU2 = range(4)


@kernel
def _bent(x, function):  # type: ignore[no-untyped-def]
    if function == SILU:
        return x / (np.float32(1) + np.exp(-x))
    if function == GELU:
        return np.float32(x * 0.5 * (1 + math.erf(x * math.sqrt(0.5))))
    if function == GELU_TANH:
        return np.float32(x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))))
    return max(x, np.float32(0)) ** 2


@kernel
def _activate_some(first, function, gated, interleaved, limit, alpha, offset, out, worker, workers):  # type: ignore[no-untyped-def]
    size = out.shape[1]
    step, up_at = (2, 1) if interleaved else (1, size)
    for row in range(worker, len(out), workers):
        for i in range(size):
            if not gated:
                out[row, i] = _bent(first[row, i] * alpha, function) / alpha
                continue
            gate, up = first[row, step * i], first[row, step * i + up_at]
            if gate > limit:  # not min: a NaN stays one
                gate = limit
            if up > limit:
                up = limit
            elif up < -limit:
                up = -limit
            out[row, i] = _bent(gate * alpha, function) / alpha * (up + offset)


@parallel_kernel
def _activate_in_parallel(first, function, gated, interleaved, limit, alpha, offset, out, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):
        _activate_some(first, function, gated, interleaved, limit, alpha, offset, out, worker, workers)


@entry("experts activate")
def activate(first, function, gated, interleaved, limit, alpha, offset, out, threads):  # type: ignore[no-untyped-def]
    """out[s] = gate(first[s]): a `Gate` by its fields, `limit` infinite where there is none."""
    workers = min(threads, out.size // LEAST_VALUES)
    if workers > 1:
        _activate_in_parallel(first, function, gated, interleaved, limit, alpha, offset, out, workers)
    else:
        _activate_some(first, function, gated, interleaved, limit, alpha, offset, out, 0, 1)


@entry("experts combine")
def combine(outputs, slots, weights, out):  # type: ignore[no-untyped-def]
    """out float32 [N, K], the sum of a token's `outputs` [places, K] by its weights float32 [N, k], in the order of its
    slots; `slots` says whose a place is."""
    ranks = weights.shape[1]
    places = np.full(weights.size, -1, np.int64)
    for place in range(len(slots)):
        places[slots[place]] = place
    out[:] = np.float32(0)
    for token in range(len(out)):
        for rank in range(ranks):
            place = places[token * ranks + rank]
            if place >= 0:
                weight = weights[token, rank]
                for i in range(out.shape[1]):
                    out[token, i] += weight * outputs[place, i]
