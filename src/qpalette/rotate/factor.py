"""One factor of a rotation: a small orthogonal matrix, named and applied along one axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpalette.core.errors import SpecError
from qpalette.rotate.dct import dct, dct_matrix, inverse_dct
from qpalette.rotate.hadamard import hadamard, is_hadamard_order, is_power_of_two

MAX_DENSE = 1024  # a DCT of a larger order goes through the FFT
MAX_PIECE_BITS = 5  # a Sylvester matrix is the Kronecker product of smaller ones; 32 was the fastest largest piece


@dataclass(frozen=True)
class Factor:
    """`kind` "h": Hadamard of `order` over sqrt(order); "c": orthonormal DCT-II of `order`.

    Raises SpecError when there is no such matrix.
    """

    kind: str
    order: int

    def __post_init__(self) -> None:
        if self.kind not in ("h", "c") or self.order < 2:
            raise SpecError(
                f"'{self.name}' is not a factor: write h (Hadamard) or c (cosine) and an order of at least 2"
            )
        if self.kind == "h" and not is_power_of_two(self.order) and not is_hadamard_order(self.order):
            raise SpecError(f"'{self.name}': no Hadamard matrix of order {self.order} is known here; use c{self.order}")
        if self.kind == "c" and self.order > MAX_DENSE and self.order % 2 == 0:
            raise SpecError(f"'{self.name}': above {MAX_DENSE} a cosine has an odd order; put its powers of two into h")

    @property
    def name(self) -> str:
        return f"{self.kind}{self.order}"

    def matrix(self) -> NDArray[np.float64]:
        """The orthogonal matrix, float64 [order, order]."""
        if self.kind == "c":
            return dct_matrix(self.order)
        dense: NDArray[np.float64] = np.ones((1, 1))
        for piece in self.pieces():
            dense = np.kron(dense, hadamard(piece.order)).astype(np.float64)
        return dense / self.order**0.5

    def pieces(self) -> tuple[Factor, ...]:
        """Smaller factors whose Kronecker product this is, cheaper to apply one by one."""
        if self.kind == "c" or not is_power_of_two(self.order):
            return (self,)
        bits = self.order.bit_length() - 1
        count = -(-bits // MAX_PIECE_BITS)
        return tuple(Factor("h", 1 << ((bits + i) // count)) for i in range(count))

    def apply(self, x: Tensor, transpose: bool) -> Tensor:
        """The matrix, or its transpose, times float32 or float64 `x` [batch, order, inner] along the middle axis."""
        if self.kind == "c" and self.order > MAX_DENSE:
            return (inverse_dct if transpose else dct)(x.transpose(1, 2)).transpose(1, 2)
        matrix = _matrix_like(self, x)
        matrix = matrix.T if transpose else matrix
        if x.shape[2] == 1:
            return (x[..., 0] @ matrix.T)[..., None]
        return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)


_plain_matrices: dict[tuple[Factor, torch.device, torch.dtype], Tensor] = {}


def _matrix_like(factor: Factor, x: Tensor) -> Tensor:
    """The factor's matrix with the device and type of `x`, kept for the next call."""
    if type(x) is not Tensor:  # a tracer's fake tensor mixes with its own kind only
        return torch.from_numpy(factor.matrix()).to(x.device, x.dtype)
    key = (factor, x.device, x.dtype)
    if key not in _plain_matrices:
        with torch.inference_mode(False):  # an inference tensor would break every later backward pass
            _plain_matrices[key] = torch.from_numpy(factor.matrix()).to(x.device, x.dtype)
    return _plain_matrices[key]
