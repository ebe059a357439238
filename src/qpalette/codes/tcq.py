"""tcq-R: trellis-coded quantization, one weight per step, at any multiple of 1/8 bit from 1 to 8.

The codebook holds quantiles of N(0,1), mirrored at zero, interpolated linearly inside 32 half-octaves of the tail
probability. A processor can look a value up, or compute it: the half-octave is the exponent and the first mantissa bit
of the index as a float, so 32 slopes and intercepts in two registers and one multiply-add are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist

import torch

from qpalette.codes.base import register
from qpalette.codes.trellis import Trellis

SEGMENTS = 32
_KNOT_GRID = 1 << 14  # dyadic knots make slopes and intercepts exact in float32: the same codebook on every machine


@register
@dataclass(frozen=True)
class TrellisCoded(Trellis):
    """One weight per step: twice the memory per weight of tcq2, so it stays near the bound at high rates."""

    family = "tcq"
    values_per_step = 1
    most_eighths = 64
    best_scale = (56, 64, 67, 69, 70, 71, 74, 76)  # the least distortion found on a grid of scales (L = 16)

    @property
    def codebook_bits(self) -> int:
        """log2 of the number of codebook entries: as many as a rate needs, few enough for a GPU's shared memory."""
        wanted = 10 if self.rate <= 4 else 12 if self.rate <= 5 else 14
        return min(wanted, self.memory)

    @property
    def index_bits(self) -> int:
        return self.codebook_bits

    def entries(self) -> torch.Tensor:
        return self.codebook()[:, None]

    def segments(self) -> tuple[torch.Tensor, torch.Tensor]:
        slopes, intercepts = torch.zeros(SEGMENTS), torch.zeros(SEGMENTS)
        for octave in range(self.codebook_bits):
            for half in range(2):
                low, width = Fraction(2 + half, 2) * 2**octave, Fraction(2**octave, 2)
                ends = [_tail_quantile(f / 2**self.codebook_bits) for f in (low, low + width)]
                slope = (ends[1] - ends[0]) / width
                index = ((127 + octave) * 2 + half) % SEGMENTS
                slopes[index] = float(self.scale * slope)
                intercepts[index] = float(self.scale * (ends[0] - slope * low))
        return slopes, intercepts

    def codebook(self) -> torch.Tensor:
        """float32 [2^codebook_bits]; the top index bit is the sign."""
        return _codebook(self)


def _tail_quantile(probability: Fraction) -> Fraction:
    """x with P(|N(0,1)| > x) = probability, on the dyadic grid."""
    if probability >= 1:
        return Fraction(0)
    return Fraction(round(-NormalDist().inv_cdf(float(probability) / 2) * _KNOT_GRID), _KNOT_GRID)


@lru_cache(maxsize=256)
def _codebook(quantizer: TrellisCoded) -> torch.Tensor:
    slopes, intercepts = quantizer.segments()
    odd = torch.arange(1, 1 << quantizer.codebook_bits, 2, dtype=torch.float32)
    segment = (odd.view(torch.int32) >> 22) % SEGMENTS
    magnitude = (slopes.double()[segment] * odd.double() + intercepts.double()[segment]).float()
    return torch.cat([magnitude, -magnitude])
