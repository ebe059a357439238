"""A weight matrix in the rotated basis of its input: W x = W' x' with x' = Q (d * x) and W' = W diag(1/d) Q^T, where d
is mostly signs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qpalette.rotate.rotation import Rotation

_CHUNK = 1 << 20  # weights rotated at a time: stays in the cache, and bounds the temporaries


def rotate_weight(weight: Tensor, rotation: Rotation, signs: Tensor) -> Tensor:
    """W' = W diag(s) Q^T, float32 [M, K], for `weight` [M, K] of a floating type and `signs` [K] of +-1.

    Raises ValueError when the shapes do not agree with the rotation.
    """
    return _by_rows(weight, rotation, signs, lambda rows: rotation.apply(rows * signs))


def unrotate_weight(weight: Tensor, rotation: Rotation, diagonal: Tensor) -> Tensor:
    """W = W' Q diag(d), float32 [M, K], for `weight` W' [M, K] and `diagonal` [K]; of signs it undoes `rotate_weight`.

    Raises ValueError when the shapes do not agree with the rotation.
    """
    return _by_rows(weight, rotation, diagonal, lambda rows: rotation.inverse(rows) * diagonal)


def _by_rows(weight: Tensor, rotation: Rotation, signs: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    if weight.ndim != 2 or weight.shape[1] != rotation.dim or signs.shape != (rotation.dim,):
        raise ValueError(
            f"rotation '{rotation.name}' takes a weight [M, {rotation.dim}] and signs [{rotation.dim}], "
            f"got {tuple(weight.shape)} and {tuple(signs.shape)}"
        )
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    step = max(1, _CHUNK // rotation.dim)
    for start in range(0, weight.shape[0], step):
        result[start : start + step] = transform(weight[start : start + step].float())
    return result
