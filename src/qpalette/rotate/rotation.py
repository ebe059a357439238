"""An orthogonal transform of a linear's input, fast to apply and readable from its name for ever."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from qpalette.core.errors import SpecError
from qpalette.rotate.factor import MAX_DENSE, Factor
from qpalette.rotate.hadamard import is_power_of_two

# Four times what any dimension needs (`choice.py`). A backend may make one matrix of these factors, 134 MB at this
# order, and a name of a few letters could ask for terabytes.
MAX_DENSE_ORDER = 4 * MAX_DENSE
_FACTOR = re.compile(r"([hc])([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Rotation:
    """Q = I (x) F1 (x) F2 (x) ... of size dim x dim: block-diagonal, each block the Kronecker product of the factors.

    The name spells the factors, joined by "x": `h36xh16` on 576 inputs is one block of Hadamard 36 (x) Hadamard 16,
    `h64` nine blocks of 64, `c107xh128` on 13696 has the orthonormal DCT-II of order 107. The input index of a block
    counts the last factor's index fastest. `hadamard.py` and `dct.py` define the matrices.

    Raises SpecError when a factor does not exist, the block, the product of the orders, does not divide `dim`, or
    `dense_order` is beyond MAX_DENSE_ORDER.
    """

    factors: tuple[Factor, ...]
    dim: int

    def __post_init__(self) -> None:
        if not self.factors:
            raise SpecError("a rotation needs at least one factor, such as h64")
        if self.dim < 1 or self.dim % self.block:
            raise SpecError(
                f"rotation '{self.name}' has blocks of {self.block}, which do not divide {self.dim} inputs: "
                f"choose factors whose product divides {self.dim}"
            )
        if self.dense_order > MAX_DENSE_ORDER:
            raise SpecError(
                f"rotation '{self.name}' has dense factors of {self.dense_order} together, and {MAX_DENSE_ORDER} is "
                "the most: write powers of two as one last factor, such as h36xh16"
            )

    @classmethod
    def parse(cls, name: str, dim: int) -> Rotation:
        """The rotation that `name` spells, on `dim` inputs. Allocates nothing. Raises SpecError."""
        matches = [_FACTOR.fullmatch(part) for part in name.split("x")] if len(name) <= 200 else [None]
        factors = []
        for match in matches:
            if match is None:
                raise SpecError(
                    f"'{name[:60]}' is not a rotation: write factors joined by x, such as h36xh16 or c107xh128"
                )
            factors.append(Factor(match[1], int(match[2])))
        return cls(tuple(factors), dim)

    @property
    def name(self) -> str:
        return "x".join(factor.name for factor in self.factors)

    @property
    def block(self) -> int:
        return math.prod(factor.order for factor in self.factors)

    @property
    def dense_order(self) -> int:
        """Of the Kronecker product of all factors but a power of two at the end, which butterflies apply, and cosines
        above MAX_DENSE, which go through the FFT."""
        last = self.factors[-1]
        rest = self.factors[:-1] if last.kind == "h" and is_power_of_two(last.order) else self.factors
        return math.prod(factor.order for factor in rest if factor.order <= MAX_DENSE or factor.kind == "h")

    def apply(self, x: Tensor) -> Tensor:
        """Q x for every vector of `x` [..., dim], a floating type, which the result keeps.

        Computes in float64 for float64 and in float32 for every other type. Raises ValueError on another shape or type.
        """
        return self._multiply(x, transpose=False)

    def inverse(self, x: Tensor) -> Tensor:
        """Q^T x for every vector of `x` [..., dim]; undoes `apply`."""
        return self._multiply(x, transpose=True)

    def matrix(self) -> Tensor:
        """Q, dense, float64 [dim, dim]: a definition to test against, not to compute with."""
        dense = torch.eye(self.dim // self.block, dtype=torch.float64)
        for factor in self.factors:
            dense = torch.kron(dense, torch.from_numpy(factor.matrix()))
        return dense

    def _multiply(self, x: Tensor, transpose: bool) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"rotation '{self.name}' takes floating vectors of {self.dim}, got {x.dtype} {tuple(x.shape)}"
            )
        work = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        inner = self.block
        for piece in [piece for factor in self.factors for piece in factor.pieces()]:
            inner //= piece.order
            batch = x.numel() // (piece.order * inner)
            work = piece.apply(work.reshape(batch, piece.order, inner), transpose)
        return work.reshape(x.shape).to(x.dtype)
