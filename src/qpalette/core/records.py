"""Plain records that travel between the stages; no behaviour, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

TILE = 16  # a tile is 16 x 16 weights: one trellis circle, one matrix-instruction operand
TILE_WEIGHTS = TILE * TILE
SCALE_BITS = 16  # one float16 per output row


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


@dataclass(frozen=True)
class LinearRecord:
    """What a quantized linear needs to be decoded, besides its tensors (DESIGN section 9)."""

    spec: str  # canonical quantizer name, e.g. "tcq-3.25"
    out_features: int
    in_features: int
    rotation: str  # canonical rotation name, e.g. "h36xh16"
    seed: int  # of the rotation's signs; provenance only, the signs themselves are stored


@dataclass(frozen=True)
class PackedBits:
    """Stored bits of one linear, part by part; `rate` counts every one of them."""

    weights: int
    codes: int
    scales: int
    signs: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.signs

    @property
    def rate(self) -> Fraction:
        return Fraction(self.total, self.weights)


def tiles_of(size: int) -> int:
    """Number of 16-wide tiles that cover `size` rows or columns; the padding is stored, so it counts."""
    return -(-size // TILE)


def packed_bits(spec_rate: Fraction, out_features: int, in_features: int) -> PackedBits:
    """Exact stored bits of an (out_features x in_features) linear whose codes have rate `spec_rate`."""
    codes = spec_rate * TILE_WEIGHTS * tiles_of(out_features) * tiles_of(in_features)
    assert codes.denominator == 1, "a tile holds whole words at every multiple of 1/8 bit"
    return PackedBits(
        weights=out_features * in_features,
        codes=int(codes),
        scales=SCALE_BITS * out_features,
        signs=8 * -(-in_features // 8),
    )
