"""tcq2-R: trellis-coded quantization, two weights per step: half the look-ups of tcq, at some distortion above 2 bits.

The codebook is a spiral of points of the right half plane whose density is that of N(0, I): radii at equal steps of the
Rayleigh distribution, directions at golden-ratio steps. A sign turns a point by half a circle. (k-means would give the
square root of that density: right for a quantizer that takes the nearest point, not for one that walks a trellis.)
Entries are exact in float16, so that a GPU holds them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import cos, log1p, pi, sin, sqrt

import torch

from qpalette.codes.base import register
from qpalette.codes.trellis import Trellis

_GOLDEN = (sqrt(5) - 1) / 2


@register
@dataclass(frozen=True)
class TrellisCodedPairs(Trellis):
    """Two weights per step. At 5 bits ten enter at a step, and a memory of 16 keeps no more than six: above, tcq."""

    family = "tcq2"
    values_per_step = 2
    most_eighths = 40
    best_scale = (57, 64, 70, 72, 74)  # the least distortion found on a grid of scales (L = 16)

    @property
    def codebook_bits(self) -> int:
        """log2 of the number of points without their sign. 512 points of 4 bytes fit in each of 32 banks of shared
        memory; above 3.25 bits they are too few. 1024 fit in every second bank, and take two turns; 2048 would take
        three, and made a 4-bit product 1.24 times slower on an H100 for 1.8 % less distortion."""
        wanted = 9 if self.eighths <= 26 else 10 if self.eighths <= 32 else 13
        return min(wanted, self.memory - 1)

    @property
    def index_bits(self) -> int:
        return self.codebook_bits + 1  # with the sign

    def entries(self) -> torch.Tensor:
        points = self.codebook()
        return torch.cat([points, -points])

    def codebook(self) -> torch.Tensor:
        """float32 [2^codebook_bits, 2]: points with a positive first coordinate, scaled for the rate."""
        return _spiral(self.codebook_bits) * float(self.scale)


@lru_cache(maxsize=8)
def _spiral(bits: int) -> torch.Tensor:
    count = 1 << bits
    points = []
    for i in range(count):
        radius = sqrt(-2 * log1p(-(i + 0.5) / count))
        angle = pi * ((i + 0.5) * _GOLDEN % 1 - 0.5)
        points.append((radius * cos(angle), radius * sin(angle)))
    return torch.tensor(points, dtype=torch.float64).half().float()
