"""The rotation of a few activation vectors in one compiled call (in torch, its small matmuls would cost more than a
matrix-vector product of SmolLM2 does)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from qpalette.backends.cpu.jit import kernel
from qpalette.rotate import Rotation, unpack_signs

LARGEST_DENSE = 1024  # orders above go through torch, whose cosine transform uses the FFT
MANY_VECTORS = 64  # above, torch's matrix products win
_BUTTERFLY = -1  # in place of a dense factor's offset


@dataclass(frozen=True)
class Transform:
    """Q diag(s), as a list of factors: order, distance between its elements, and where its matrix starts."""

    rotation: Rotation
    orders: np.ndarray
    inners: np.ndarray
    offsets: np.ndarray
    matrices: np.ndarray
    scale: np.float32
    padded: int
    compiled: bool

    def apply(self, x: torch.Tensor, signs: torch.Tensor) -> np.ndarray:
        """x [N, K], any float dtype; signs packed. Returns float32 [N, padded], zeros beyond K."""
        out = np.zeros((x.shape[0], self.padded), np.float32)
        if not self.compiled or x.shape[0] > MANY_VECTORS:
            rotated = self.rotation.apply(x.float() * unpack_signs(signs, self.rotation.dim))
            out[:, : self.rotation.dim] = rotated.numpy()
        else:
            inputs = x.detach().float().contiguous().numpy()
            _transform_rows(
                inputs, signs.numpy(), self.orders, self.inners, self.offsets, self.matrices, self.scale, out
            )
        return out


def make_transform(name: str, dim: int, padded: int) -> Transform:
    """The transform of `dim` inputs that the rotation `name` spells, its output zero-padded to `padded`."""
    rotation = Rotation.parse(name, dim)
    orders, inners, offsets, matrices = [], [], [], [np.zeros(0, np.float32)]
    inner, scale = rotation.block, 1.0
    for factor in rotation.factors:
        inner //= factor.order
        orders.append(factor.order)
        inners.append(inner)
        if factor.kind == "h" and factor.order & (factor.order - 1) == 0:
            offsets.append(_BUTTERFLY)
            scale /= math.sqrt(factor.order)
        else:
            offsets.append(sum(matrix.size for matrix in matrices))
            matrices.append(
                factor.matrix().astype(np.float32).ravel() if factor.order <= LARGEST_DENSE else matrices[0]
            )
    return Transform(
        rotation,
        np.array(orders),
        np.array(inners),
        np.array(offsets),
        np.concatenate(matrices),
        np.float32(scale),
        padded,
        compiled=all(
            offset == _BUTTERFLY or order <= LARGEST_DENSE for offset, order in zip(offsets, orders, strict=True)
        ),
    )


@kernel
def _butterflies(row, size, order, inner):  # type: ignore[no-untyped-def]
    """Sylvester-Hadamard of `order` along elements `inner` apart, unnormalised, in place."""
    half = inner
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
def _transform_rows(x, signs, orders, inners, offsets, matrices, scale, out):  # type: ignore[no-untyped-def]
    size = x.shape[1]
    scratch = np.empty(size, np.float32)
    for n in range(x.shape[0]):
        row = out[n]
        for k in range(size):
            row[k] = -x[n, k] * scale if (signs[k >> 3] >> (k & 7)) & 1 else x[n, k] * scale
        for f in range(orders.size):
            if offsets[f] == _BUTTERFLY:
                _butterflies(row, size, orders[f], inners[f])
            else:
                _dense(row, size, orders[f], inners[f], matrices[offsets[f] :], scratch)
