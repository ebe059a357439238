"""The rotation of a few activation vectors, compiled: in torch its small matmuls would cost more than a matrix-vector
product of SmolLM2 does."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import inlined, kernel
from qpalette.rotate import Rotation

LARGEST_DENSE = 1024  # orders above go through torch, whose cosine transform uses the FFT
_BUTTERFLY = -1  # in place of a dense factor's offset


class Factors(NamedTuple):
    """A rotation as `transform_rows` takes it, factor by factor: order, distance between its elements, and where its
    matrix starts in `matrices`, or _BUTTERFLY; `scale` is what the unnormalised butterflies leave out."""

    orders: np.ndarray
    inners: np.ndarray
    offsets: np.ndarray
    matrices: np.ndarray
    scale: np.float32


@lru_cache(maxsize=1024)
def factors_of(name: str, dim: int, inverse: bool = False) -> Factors | None:
    """The rotation of `dim` inputs that `name` spells, or the way back; None when a factor is better left to torch."""
    rotation = Rotation.parse(name, dim)
    orders, inners, offsets, matrices = [], [], [], [np.zeros(1, np.float32)]
    inner, scale = rotation.block, 1.0
    for factor in rotation.factors:
        inner //= factor.order
        orders.append(factor.order)
        inners.append(inner)
        if factor.kind == "h" and factor.order & (factor.order - 1) == 0:
            offsets.append(_BUTTERFLY)
            scale /= math.sqrt(factor.order)
        elif factor.order <= LARGEST_DENSE:
            offsets.append(sum(matrix.size for matrix in matrices))
            matrix = factor.matrix().astype(np.float32)
            matrices.append((matrix.T if inverse else matrix).ravel())
        else:
            return None
    return Factors(np.array(orders), np.array(inners), np.array(offsets), np.concatenate(matrices), np.float32(scale))


@kernel
def _butterflies(row, size, order, inner):  # type: ignore[no-untyped-def]
    """Sylvester-Hadamard of `order` along elements `inner` apart, unnormalised, in place."""
    half = inner
    if inner == 1 and order >= simd.LANES:
        for start in range(0, size, simd.LANES):
            lanes = simd.butterfly2(simd.butterfly1(simd.loadf(row, start)))
            simd.store(row, start, simd.butterfly8(simd.butterfly4(lanes)))
        half = simd.LANES
    while half % simd.LANES != 0 and half < order * inner:
        for start in range(0, size, 2 * half):
            for i in range(start, start + half):
                a, b = row[i], row[i + half]
                row[i] = a + b
                row[i + half] = a - b
        half *= 2
    while 2 * half < order * inner:
        for start in range(0, size, 4 * half):
            for i in range(start, start + half, simd.LANES):
                _two_at_once(row, i, half)
        half *= 4
    if half < order * inner:
        for start in range(0, size, 2 * half):
            for i in range(start, start + half, simd.LANES):
                a, b = simd.loadf(row, i), simd.loadf(row, i + half)
                simd.store(row, i, simd.addf(a, b))
                simd.store(row, i + half, simd.subf(a, b))


@inlined
def _two_at_once(row, i, half):  # type: ignore[no-untyped-def]
    """The butterflies of `half` and of twice that, of a vector and those three that it meets."""
    a, b = simd.loadf(row, i), simd.loadf(row, i + half)
    c, d = simd.loadf(row, i + 2 * half), simd.loadf(row, i + 3 * half)
    sum_ab, difference_ab, sum_cd, difference_cd = simd.addf(a, b), simd.subf(a, b), simd.addf(c, d), simd.subf(c, d)
    simd.store(row, i, simd.addf(sum_ab, sum_cd))
    simd.store(row, i + half, simd.addf(difference_ab, difference_cd))
    simd.store(row, i + 2 * half, simd.subf(sum_ab, sum_cd))
    simd.store(row, i + 3 * half, simd.subf(difference_ab, difference_cd))


@kernel
def _dense(row, size, order, inner, matrices, first, scratch):  # type: ignore[no-untyped-def]
    """The matrix [order, order] at matrices[first], along elements `inner` apart, in place."""
    for start in range(0, size, order * inner):
        whole = inner // simd.LANES * simd.LANES
        for c in range(0, whole, simd.LANES):
            for i in range(0, order, 4):
                _four_results(row, start + c, order, inner, matrices, first, i, scratch, c)
        for i in range(order if whole < inner else 0):
            for c in range(whole, inner):
                total = np.float32(0)
                for j in range(order):
                    total += matrices[first + i * order + j] * row[start + j * inner + c]
                scratch[i * inner + c] = total
        row[start : start + order * inner] = scratch[: order * inner]


@inlined
def _four_results(row, start, order, inner, matrices, first, i, scratch, c):  # type: ignore[no-untyped-def]
    """Of sixteen columns: those of the matrix' rows from `i` on, in registers; past the last row the last one again."""
    ends = min(i + 1, order - 1), min(i + 2, order - 1), min(i + 3, order - 1)
    p, q, r, s = (first + i * order, first + ends[0] * order, first + ends[1] * order, first + ends[2] * order)
    zero = simd.splatf(np.float32(0))
    totals = zero, zero, zero, zero
    for j in range(order):
        x = simd.loadf(row, start + j * inner)
        totals = (
            simd.fmaf(simd.load_splatf(matrices, p + j), x, totals[0]),
            simd.fmaf(simd.load_splatf(matrices, q + j), x, totals[1]),
            simd.fmaf(simd.load_splatf(matrices, r + j), x, totals[2]),
            simd.fmaf(simd.load_splatf(matrices, s + j), x, totals[3]),
        )
    simd.store(scratch, i * inner + c, totals[0])
    simd.store(scratch, ends[0] * inner + c, totals[1])
    simd.store(scratch, ends[1] * inner + c, totals[2])
    simd.store(scratch, ends[2] * inner + c, totals[3])


@kernel
def sign_multiplier(signs, size):  # type: ignore[no-untyped-def]
    """The input diagonal that packed `signs` stand for, as `transform_rows` takes it: float32 [size] of +-1."""
    multiplier = np.empty(size, np.float32)
    whole, one = size // simd.LANES * simd.LANES, simd.splatf(np.float32(1))
    for k in range(0, whole, simd.LANES):
        bits = simd.to_float(simd.load_fields1(signs, k >> 3))
        simd.store(multiplier, k, simd.fmaf(bits, simd.splatf(np.float32(-2)), one))
    for k in range(whole, size):
        multiplier[k] = np.float32(1 - 2 * np.int32((signs[k >> 3] >> (k & 7)) & 1))
    return multiplier


@kernel
def half_multiplier(values):  # type: ignore[no-untyped-def]
    """The same of a diagonal of float16 bits, int16 [size]."""
    multiplier = np.empty(values.size, np.float32)
    for k in range(values.size):
        multiplier[k] = simd.half_to_float(values[k])
    return multiplier


@kernel
def transform_rows(x, multiplier, rotation, out):  # type: ignore[no-untyped-def]
    """out[n, :K] = Q (multiplier * x[n]), float32; `multiplier` float32 [K], `rotation` a Factors."""
    scratch = np.empty(x.shape[1], np.float32)
    for n in range(x.shape[0]):
        row = out[n, : x.shape[1]]
        row[:] = x[n]
        transform_row(row, multiplier, rotation, scratch)


@kernel
def transform_row(row, multiplier, rotation, scratch):  # type: ignore[no-untyped-def]
    """row = Q (multiplier * row), float32 [K] all; what is in `scratch`, [K], before and after has no meaning."""
    orders, inners, offsets, matrices, scale = rotation
    size = row.size
    whole = size // simd.LANES * simd.LANES
    for k in range(0, whole, simd.LANES):
        scaled = simd.mulf(simd.loadf(row, k), simd.loadf(multiplier, k))
        simd.store(row, k, simd.mulf(scaled, simd.splatf(scale)))
    for k in range(whole, size):
        row[k] = row[k] * multiplier[k] * scale
    for f in range(orders.size):
        if offsets[f] == _BUTTERFLY:
            _butterflies(row, size, orders[f], inners[f])
        else:
            _dense(row, size, orders[f], inners[f], matrices, offsets[f], scratch)
