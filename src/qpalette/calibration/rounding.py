"""A linear as calibrated rounding sees it: unit rows in the rotated, equalized basis, and the factors of both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpalette.calibration.feedback import DAMPING, Feedback, factorize, stack_factors
from qpalette.calibration.hessians import rotate_hessian, row_blocks
from qpalette.core.records import FLOAT16, SIGNS
from qpalette.rotate import Rotation, rotate_weight, unrotate_weight

OUTPUT_DAMPING = 0.3  # as `feedback.DAMPING`, of H_O, whose few large directions are less certain


@dataclass(frozen=True)
class Rounding:
    """How calibrated rounding goes about it."""

    damping: float = DAMPING  # of H_I
    output_damping: float = OUTPUT_DAMPING
    equalize: bool = True  # columns, by a float16 diagonal of the input in place of signs

    @property
    def diagonal(self) -> str:
        """The kind of diagonal that calibrated linears store."""
        return FLOAT16 if self.equalize else SIGNS


ROUNDING = Rounding()


@dataclass(frozen=True)
class Shaping:
    """The linear map from plain rounding errors R, in unit rows, to the error that feedback leaves in a linear:

    E = diag(rms) (I + V)^-T R (I + U)^-1 Q diag(diagonal),  all float32.
    """

    upper: Tensor  # U, [K, K]
    lefts: tuple[Tensor, ...]  # V of each block of rows, or none
    rms: Tensor
    diagonal: Tensor
    rotation: Rotation

    def apply(self, noise: Tensor) -> Tensor:
        """E [M, K], in the basis of the checkpoint, of R [M, K]."""
        fed = _solve(self.upper, noise, upper=True, left=False)
        if self.lefts:
            fed = torch.cat([_solve(left.T, rows, upper=False) for left, rows in self._by_blocks(fed)])
        return unrotate_weight(fed * self.rms, self.rotation, self.diagonal)

    def adjoint(self, gradient: Tensor) -> Tensor:
        """The matrix A [M, K] with tr(A^T R) = tr(G^T E) for every R, of a `gradient` G [M, K] of the weight."""
        turned = self.rotation.apply(gradient.float() * self.diagonal) * self.rms
        pulled = _solve(self.upper.T, turned, upper=False, left=False)
        if not self.lefts:
            return pulled
        return torch.cat([_solve(left, rows, upper=True) for left, rows in self._by_blocks(pulled)])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.upper, *self.lefts))

    def _by_blocks(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.lefts, rows.split([len(left) for left in self.lefts]), strict=True))


@dataclass(frozen=True)
class Prepared:
    """W = diag(rms) unit Q diag(diagonal), and the factors of H_I and diag(rms) H_O diag(rms) in that basis.

    unit: float32 [M, K], rows of variance 1; rms: float64 [M, 1]; diagonal: float32 [K], each exactly a float16;
    moments: H_I before damping, float32 [K, K], of mean diagonal 1; outputs: one for each block of rows, or none.
    """

    name: str
    unit: Tensor
    rms: Tensor
    diagonal: Tensor
    rotation: Rotation
    inputs: Feedback
    moments: Tensor
    outputs: tuple[Feedback, ...]
    output_moments: tuple[Tensor, ...]

    @property
    def left(self) -> Tensor | None:
        """V of all blocks, as `encode_with_feedback` takes it."""
        return stack_factors(self.outputs) if self.outputs else None

    @property
    def shaping(self) -> Shaping:
        size = self.rotation.dim
        heights = [len(block.hessian) for block in self.outputs]
        lefts = [block.upper[:n, :n].float() for block, n in zip(self.outputs, heights, strict=True)]
        upper = self.inputs.upper[:size, :size].float()
        return Shaping(upper, tuple(lefts), self.rms.float(), self.diagonal, self.rotation)

    def restore(self, unit: Tensor) -> Tensor:
        """A matrix of unit rows in this basis [M, K], such as an error, in that of the checkpoint: float32."""
        return unrotate_weight(unit * self.rms, self.rotation, self.diagonal)


def input_diagonal(scale: Tensor | None, signs: Tensor) -> Tensor:
    """What multiplies an input, float32 [K] on the device of `signs` [K]: these, times S of `equalize` as float16 has
    it where columns are equalized."""
    return signs.float() if scale is None else scale.to(signs.device, torch.float16).float() * signs


def prepare(
    name: str,
    weight: Tensor,
    rotation: Rotation,
    diagonal: Tensor,
    hessian: Tensor,
    outputs: Sequence[Tensor],
    rounding: Rounding,
) -> Prepared:
    """`weight` [M, K], and H_I [K, K] and the blocks of H_O in the basis of the checkpoint, for rounding: float64
    factors on the device of `diagonal`.

    Raises HessianError as `factorize`, naming the linear.
    """
    device = diagonal.device
    rotated = rotate_weight(weight.to(device), rotation, 1 / diagonal)
    rms = torch.linalg.vector_norm(rotated, dim=1, keepdim=True, dtype=torch.float64) / rotation.dim**0.5
    unit = torch.where(rms > 0, rotated / rms, 0.0).float()
    moments = rotate_hessian(hessian.to(device), rotation, diagonal)
    scaled = [
        block.to(device).double() * rms[rows] * rms[rows].T
        for block, rows in zip(outputs, row_blocks(len(weight)) if outputs else (), strict=True)
    ]
    mean = sum(float(block.diagonal().sum()) for block in scaled) / len(weight) or 1.0
    return Prepared(
        name=name,
        unit=unit,
        rms=rms,
        diagonal=diagonal,
        rotation=rotation,
        inputs=factorize(moments, rounding.damping, name),
        moments=(moments / moments.diagonal().mean()).float(),
        outputs=tuple(factorize(block, rounding.output_damping, f"the outputs of {name}") for block in scaled),
        output_moments=tuple((block / mean).float() for block in scaled),
    )


def _solve(strict: Tensor, right: Tensor, upper: bool, left: bool = True) -> Tensor:
    """(I + `strict`)^-1 times `right`, or with `left` False the other way round; `strict` is strictly triangular."""
    return torch.linalg.solve_triangular(strict, right, upper=upper, left=left, unitriangular=True)
