"""The input's diagonal that makes all columns of a weight matrix equally long: what a code of unit variance likes best.

With full feedback only the determinant of H_I counts. A diagonal S with W S^-1 and S H_I S changes the loss through
|W S^-1|^2 (det S)^(2/K) alone, which is least where all columns have the same norm. Rows have scales of their own
already, so rows and columns take turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 3
FAINTEST = 2.0**-10  # against the geometric mean: columns of zeros, and float16's range


def equalize(weights: Sequence[Tensor]) -> Tensor:
    """S, float64 [K] with a geometric mean of 1, for matrices [M, K] that read the same input, their rows together.

    Unit rows of W S^-1 then have columns of about one norm. Any floating type, any device.
    """
    scale = torch.ones(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    count = sum(len(weight) for weight in weights)
    for _ in range(ROUNDS):
        # In float64 and matrix by matrix, so that the sum does not depend on what else is in memory.
        energy = torch.stack([_column_energy(weight.double(), scale) for weight in weights]).sum(0)
        scale = (energy / count).sqrt()
        scale = _centred(scale.clamp_min(FAINTEST * float(scale.mean()) or 1.0))
    return _centred(scale.clamp(FAINTEST, 1 / FAINTEST))


def row_mean_square(weight: Tensor) -> Tensor:
    """float32 [M] of a weight [M, K]: the variance of the errors in each row, in units of the distortion."""
    return weight.detach().float().square().mean(1)


def _column_energy(weight: Tensor, scale: Tensor) -> Tensor:
    """sum over rows of the squares in each column, once the rows of W S^-1 have unit variance."""
    norms = (weight / scale).square().mean(1, keepdim=True)
    return torch.where(norms > 0, weight.square() / norms, 0.0).sum(0)


def _centred(scale: Tensor) -> Tensor:
    return scale / scale.log().mean().exp()
