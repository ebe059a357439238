"""What is coded instead of a key or a value: y = A (x - m), with an A and an m for each head.

k' = k + e moves the logits of every later query q by q.e. A code whose error is white in y costs, for a metric G (of
keys the queries' second moment) and a covariance C of the vectors, in proportion to tr(A^-T G A^-1) tr(A C A^T). The
least of that product is at A^T A = P, the solution of P C P = G (Cauchy-Schwarz; P is the optimal transport map from
N(0, C) to N(0, G): Knott and Smith, "On the optimal mapping of distributions", 1984). Signs and a Hadamard matrix after
it make the coordinates alike, and near Gaussian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qpalette.rotate import full_rotation, random_signs

SIGNS = "kv cache"  # what the signs are drawn for; with the seed 0 they are the same in every model
FLOOR = 1e-3  # of a second moment's mean eigenvalue, added to each: few tokens leave some directions unseen


@dataclass(frozen=True)
class Transform:
    """matrix and inverse: float32 [heads or 1, dim, dim]; mean: float32 [heads or 1, dim].

    Where errors are shaped (`shaping.py`) there are feedback, float32 [heads, dim, dim], strictly lower triangular, and
    gain, float32 [heads]: the scale over the root of a vector's mean square.
    """

    matrix: Tensor
    inverse: Tensor
    mean: Tensor
    feedback: Tensor | None = None
    gain: Tensor | None = None

    def apply(self, vectors: Tensor) -> Tensor:
        """x, any float [batch, heads, tokens, dim] -> y = A (x - m), float32."""
        return (vectors.float() - self.mean[:, None]) @ self.matrix.mT

    def undo(self, coordinates: Tensor) -> Tensor:
        """y [batch, heads, tokens, dim] -> x = A^-1 y + m, float32."""
        return coordinates @ self.inverse.mT + self.mean[:, None]

    @property
    def shaping(self) -> tuple[Tensor, Tensor] | None:
        """Feedback and gain, if there are any."""
        return None if self.feedback is None or self.gain is None else (self.feedback, self.gain)

    def split(self, heads: Sequence[int]) -> list[Transform]:
        """Transforms of so many heads each."""
        tensors = (self.matrix, self.inverse, self.mean, self.feedback, self.gain)
        parts = [[None] * len(heads) if tensor is None else tensor.split(list(heads)) for tensor in tensors]
        return [Transform(*part) for part in zip(*parts, strict=True)]

    def laid_out(self) -> Transform:
        """The same numbers in memory as kernels read them, the inverse and the transposes of matrix and feedback in one
        piece: so a stream needs no copy of them."""
        feedback = None if self.feedback is None else _by_columns(self.feedback)
        return replace(self, matrix=_by_columns(self.matrix), inverse=self.inverse.contiguous(), feedback=feedback)

    def to(self, device: torch.device) -> Transform:
        feedback, gain = (None if tensor is None else tensor.to(device) for tensor in (self.feedback, self.gain))
        return Transform(self.matrix.to(device), self.inverse.to(device), self.mean.to(device), feedback, gain)


def made_of(matrix: Tensor, mean: Tensor) -> Transform:
    """From A, [heads, dim, dim], and the mean [heads, dim]."""
    exact = matrix.double()
    return Transform(exact.float(), torch.linalg.inv(exact).float(), mean.float())


def white(dim: int) -> Transform:
    """Signs and a Hadamard matrix, alike for all heads: nothing of the model is known."""
    inverse = mixing(dim)[None].mT.float().contiguous()
    return Transform(inverse.mT, inverse, torch.zeros(1, dim))


def mean_removed(mean: Tensor, covariance: Tensor) -> Transform:
    """`white` without the mean, [heads, dim], and with coordinates of unit variance."""
    matrix = mixing(mean.shape[-1]).expand(*covariance.shape).clone()
    return made_of(_normalised(matrix, covariance.double()), mean)


def balanced(mean: Tensor, covariance: Tensor, metric: Tensor) -> Transform:
    """The best for one rate: `mean` [heads, dim], `covariance` C and `metric` G [heads, dim, dim], any scale of G."""
    c, g = raised(covariance.double()), raised(metric.double())
    root = power(c, 0.5)
    inverse_root = power(c, -0.5)
    transport = inverse_root @ power(root @ g @ root, 0.5) @ inverse_root
    matrix = mixing(mean.shape[-1]) @ power(transport, 0.5)
    return made_of(_normalised(matrix, covariance.double()), mean)


def mixing(dim: int) -> Tensor:
    """Signs, then a Hadamard matrix (docs/format.md), orthogonal, float64 [dim, dim]."""
    signs = random_signs(dim, 0, SIGNS).double()
    return full_rotation(dim).matrix() * signs


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.mT.contiguous().mT


def _normalised(matrix: Tensor, covariance: Tensor) -> Tensor:
    """Coordinates of variance 1 in the mean: a one-byte scale has its range around that."""
    variance = (matrix @ covariance @ matrix.mT).diagonal(dim1=-2, dim2=-1).mean(-1)
    return matrix / variance.clamp(min=torch.finfo(torch.float32).tiny).sqrt()[:, None, None]


def raised(moment: Tensor) -> Tensor:
    """A second moment [heads, dim, dim] that can be inverted."""
    level = FLOOR * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = level.clamp(min=torch.finfo(torch.float32).tiny)  # a head that is never anything but zero
    return moment + level[:, None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Of symmetric positive definite matrices [heads, dim, dim]."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    least = values[..., -1:] * torch.finfo(values.dtype).eps
    return (vectors * values.clamp(min=least)[..., None, :] ** exponent) @ vectors.mT
