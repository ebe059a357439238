"""nuq-b: one scalar codebook of 2^b Lloyd-Max levels, the cheapest code to decode."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from qpalette.codes.base import Quantizer, entries_on, register
from qpalette.codes.bits import pack_fields, windows
from qpalette.codes.description import LANE_WEIGHTS, Decoder
from qpalette.core.errors import SpecError
from qpalette.core.records import TILE_WEIGHTS
from qpalette.theory.lloyd_max import lloyd_max

LEAST_BITS, MOST_BITS = 2, 8


@register
@dataclass(frozen=True)
class NonUniform(Quantizer):
    """Nearest of 2^bits levels that are optimal for N(0,1) (Max 1960; Lloyd 1982)."""

    family = "nuq"
    bits: int

    @property
    def rate(self) -> Fraction:
        return Fraction(self.bits)

    @property
    def name(self) -> str:
        return f"nuq-{self.bits}"

    @property
    def claimed_distortion(self) -> float:
        """Exact: the fixed point of Lloyd's conditions, by closed-form integrals."""
        return lloyd_max(1 << self.bits).distortion

    @classmethod
    def parse(cls, parameters: str) -> NonUniform:
        if not (parameters.isdecimal() and LEAST_BITS <= int(parameters) <= MOST_BITS):
            raise SpecError(f"'nuq-{parameters}' is not a quantizer: nuq takes {LEAST_BITS} to {MOST_BITS} whole bits")
        return cls(int(parameters))

    @classmethod
    def palette(cls) -> tuple[NonUniform, ...]:
        return tuple(cls(bits) for bits in range(LEAST_BITS, MOST_BITS + 1))

    @property
    def decoder(self) -> Decoder:
        return Decoder((self.bits,) * LANE_WEIGHTS, 1, self.bits, self.bits, hashed=False)

    def entries(self) -> torch.Tensor:
        return self.codebook()[:, None]

    def codebook(self) -> torch.Tensor:
        """The levels, rising, float32 [2^bits]."""
        return torch.tensor(lloyd_max(1 << self.bits).codebook, dtype=torch.float32)

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        levels = entries_on(self, tiles.device)[:, 0]
        index = torch.bucketize(tiles, (levels[1:] + levels[:-1]) / 2)
        return pack_fields(index, torch.full((TILE_WEIGHTS,), self.bits))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        ends = self.bits * torch.arange(1, TILE_WEIGHTS + 1, device=codes.device)
        return entries_on(self, codes.device)[:, 0][windows(codes, ends, self.bits)]
