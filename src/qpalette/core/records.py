"""Plain records that travel between the stages; no behaviour, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

TILE = 16  # a tile is 16 x 16 weights: one trellis circle, one matrix-instruction operand
TILE_WEIGHTS = TILE * TILE


@dataclass(frozen=True)
class LinearShape:
    """One weight matrix of a checkpoint: `out_features` rows by `in_features` columns."""

    name: str  # without the trailing ".weight"
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input (q/k/v, gate/up): they share one rotation."""

    name: str
    linears: tuple[LinearShape, ...]

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features

    @property
    def weights(self) -> int:
        return sum(linear.weights for linear in self.linears)


SIGNS, FLOAT16 = DIAGONALS = ("signs", "float16")


@dataclass(frozen=True)
class LinearRecord:
    """What a quantized linear needs to be decoded, besides its tensors (DESIGN section 9)."""

    spec: str  # canonical quantizer name, e.g. "tcq-3.25"
    out_features: int
    in_features: int
    rotation: str  # canonical rotation name, e.g. "h36xh16"
    seed: int  # of the rotation's signs; provenance only, the signs themselves are stored
    group: str = ""  # linears of one group read one input in one basis, and run as one launch; "": alone
    diagonal: str = SIGNS  # of DIAGONALS: what multiplies the input before the rotation
    source: tuple[str, ...] = ()  # tensors of the original that it was made of, where not its own name + ".weight"

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class PackedBits:
    """Stored bits of linears, part by part (`formats.parts`); `rate` counts every one of them."""

    weights: int
    parts: Mapping[str, int]  # suffix of a part -> bits

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def rate(self) -> Fraction:
        return Fraction(self.total, self.weights)

    @classmethod
    def sum(cls, bits: Iterable[PackedBits]) -> PackedBits:
        weights, parts = 0, Counter[str]()
        for one in bits:
            weights += one.weights
            parts.update(one.parts)
        return cls(weights, dict(parts))


def tiles_of(size: int) -> int:
    """Number of 16-wide tiles that cover `size` rows or columns; the padding is stored, so it counts."""
    return -(-size // TILE)
