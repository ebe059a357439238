"""vq-R: the nearest of 2^(2R) points of the plane for each pair of weights, at steps of half a bit."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from qpalette.codes.base import Quantizer, entries_on, register
from qpalette.codes.bits import pack_fields, windows
from qpalette.codes.description import LANE_WEIGHTS, Decoder
from qpalette.core.errors import SpecError
from qpalette.core.rate import format_rate, parse_rate
from qpalette.core.records import TILE_WEIGHTS

LEAST_INDEX_BITS, MOST_INDEX_BITS = 3, 12
CODEBOOKS = Path(__file__).with_name("vq_codebooks.safetensors")
_PAIRS = TILE_WEIGHTS // 2
_CHUNK = 1 << 14  # pairs compared with all points at a time

# Mean squared error of each codebook on N(0, 1), by index bits, as `benchmarks/make_vq_codebooks.py` printed it.
_DISTORTION = {
    3: 0.201282,
    4: 0.107647,
    5: 0.056974,
    6: 0.029719,
    7: 0.015245,
    8: 0.007737,
    9: 0.003917,
    10: 0.001972,
    11: 0.000988,
    12: 0.000496,
}


@register
@dataclass(frozen=True)
class VectorQuantized(Quantizer):
    """A 2-D codebook, k-means on N(0, I) (Linde, Buzo, Gray 1980); entries exact in float16."""

    family = "vq"
    index_bits: int

    @property
    def rate(self) -> Fraction:
        return Fraction(self.index_bits, 2)

    @property
    def name(self) -> str:
        return f"vq-{format_rate(self.rate)}"

    @property
    def claimed_distortion(self) -> float:
        """Measured when the codebook was made, on 2^24 pairs that it was not made from."""
        return _DISTORTION[self.index_bits]

    @classmethod
    def parse(cls, parameters: str) -> VectorQuantized:
        bits = parse_rate(parameters) * 2
        if bits.denominator != 1 or not LEAST_INDEX_BITS <= bits <= MOST_INDEX_BITS:
            raise SpecError(f"'vq-{parameters}' is not a quantizer: vq takes multiples of 0.5 from 1.5 to 6 bits")
        return cls(int(bits))

    @classmethod
    def palette(cls) -> tuple[VectorQuantized, ...]:
        return tuple(cls(bits) for bits in range(LEAST_INDEX_BITS, MOST_INDEX_BITS + 1))

    @property
    def decoder(self) -> Decoder:
        return Decoder((self.index_bits,) * (LANE_WEIGHTS // 2), 2, self.index_bits, self.index_bits, hashed=False)

    def entries(self) -> torch.Tensor:
        return self.codebook()

    def codebook(self) -> torch.Tensor:
        """float32 [2^index_bits, 2]."""
        return _codebooks()[str(self.index_bits)].float()

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        points = entries_on(self, tiles.device)
        pairs = tiles.reshape(-1, 2)
        nearest = torch.cat([_nearest(chunk, points) for chunk in pairs.split(_CHUNK)])
        return pack_fields(nearest.reshape(-1, _PAIRS), torch.full((_PAIRS,), self.index_bits))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        ends = self.index_bits * torch.arange(1, _PAIRS + 1, device=codes.device)
        index = windows(codes, ends, self.index_bits)
        return entries_on(self, codes.device)[index].reshape(codes.shape[0], TILE_WEIGHTS)


def _nearest(pairs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Index of the nearest point, the first of equals."""
    return (pairs[:, None, :] - points).square().sum(-1).argmin(1)


@lru_cache(maxsize=1)
def _codebooks() -> dict[str, torch.Tensor]:
    return load_file(CODEBOOKS)
