"""The rotation of a few activation vectors, compiled: in torch its small matmuls would cost more than a matrix-vector
product of SmolLM2 does."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import kernel
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
    while half < order * inner:
        for start in range(0, size, 2 * half):
            for i in range(start, start + half):
                a, b = row[i], row[i + half]
                row[i] = a + b
                row[i + half] = a - b
        half *= 2


@kernel
def _dense(row, size, order, inner, matrix, scratch):  # type: ignore[no-untyped-def]
    for start in range(0, size, order * inner):
        for i in range(order):
            out = scratch[i * inner : (i + 1) * inner]
            out[:] = np.float32(0)
            for j in range(order):
                m = matrix[i * order + j]
                source = row[start + j * inner : start + (j + 1) * inner]
                for c in range(inner):
                    out[c] += m * source[c]
        row[start : start + order * inner] = scratch[: order * inner]


@kernel
def sign_multiplier(signs, size):  # type: ignore[no-untyped-def]
    """The input diagonal that packed `signs` stand for, as `transform_rows` takes it: float32 [size] of +-1."""
    multiplier = np.empty(size, np.float32)
    for k in range(size):
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
    orders, inners, offsets, matrices, scale = rotation
    size = x.shape[1]
    scratch = np.empty(size, np.float32)
    for n in range(x.shape[0]):
        row = out[n, :size]
        for k in range(size):
            row[k] = x[n, k] * multiplier[k] * scale
        for f in range(orders.size):
            if offsets[f] == _BUTTERFLY:
                _butterflies(row, size, orders[f], inners[f])
            else:
                _dense(row, size, orders[f], inners[f], matrices[offsets[f] :], scratch)
