"""tcq-R: trellis-coded quantization at any multiple of 1/8 bit, one weight per step.

The code (DESIGN section 3; the bitshift trellis is that of QTIP, arXiv 2406.11235):

- A tile's stream is a circle of 256 R bits. Step t shifts in k_t = floor((t+1) R) - floor(t R) bits, so that fractional
  rates share one trellis and the search spends bits where they help.
- The state after step t is the last L bits of the stream ("memory" L).
- Its value is codebook[top bits of h], h = s (2 s + 1) mod 2^L. A quadratic permutation: every entry is used equally
  often. Against s^2 + s, which is two-to-one, it lowers the distortion by 1.2 % at 2 bits and 1.6 % at 3.25 (L = 16).
- The codebook holds quantiles of N(0,1), mirrored at zero, interpolated linearly inside 32 half-octaves of the tail
  probability. A processor can look a value up in the table, or compute it: the half-octave is the exponent and first
  mantissa bit of the index as a float, so 32 slopes and intercepts in two registers and one multiply-add are enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import floor
from statistics import NormalDist

import torch

from qpalette.core.errors import SpecError
from qpalette.core.rate import format_rate, parse_rate
from qpalette.core.records import TILE_WEIGHTS
from qpalette.pack.bits import pack_fields, windows
from qpalette.quantizers.base import Quantizer, register
from qpalette.theory.gaussian import distortion_bound

EFFORT = {"fast": 12, "standard": 16, "best": 18}  # names of trellis memories
MEMORIES = (12, 16, 18, 20)
STANDARD = EFFORT["standard"]
SEGMENTS = 32
_KNOT_GRID = 1 << 14  # dyadic knots make slopes and intercepts exact in float32: the same codebook on every machine
_SCALE_GRID = 64
_UNREACHABLE = 1e30

# Source scale of the codebook in 1/64 at 1 .. 8 bits: the least distortion found on a grid of scales (L = 16).
_SCALE = (56, 64, 67, 69, 70, 71, 74, 76)
# Distortion over Shannon's bound at 1 .. 8 bits, from `qpalette palette --measure`; interpolated in between.
_GAP = {
    12: (1.10, 1.16, 1.23, 1.33, 1.45, 1.60, 1.80, 2.20),
    16: (1.07, 1.082, 1.10, 1.123, 1.15, 1.19, 1.22, 1.28),
    18: (1.06, 1.07, 1.08, 1.10, 1.12, 1.14, 1.17, 1.21),
    20: (1.06, 1.06, 1.07, 1.085, 1.10, 1.12, 1.14, 1.18),
}


@register
@dataclass(frozen=True)
class TrellisCoded(Quantizer):
    """A rate of `eighths` / 8 bits, and a trellis whose state is `memory` bits."""

    family = "tcq"
    eighths: int
    memory: int = STANDARD

    @property
    def rate(self) -> Fraction:
        return Fraction(self.eighths, 8)

    @property
    def name(self) -> str:
        suffix = "" if self.memory == STANDARD else f"-L{self.memory}"
        return f"tcq-{format_rate(self.rate)}{suffix}"

    @property
    def claimed_distortion(self) -> float:
        """Measured: `qpalette palette --measure` (tail-biting in two passes, 10^6 weights or more)."""
        return _interpolate(_GAP[self.memory], self.rate) * distortion_bound(float(self.rate))

    @classmethod
    def parse(cls, parameters: str) -> TrellisCoded:
        rate_text, dash, memory_text = parameters.partition("-L")
        eighths = parse_rate(rate_text) * 8
        if eighths.denominator != 1 or not 8 <= eighths <= 64:
            raise SpecError(f"'tcq-{parameters}' is not a quantizer: tcq takes multiples of 0.125 from 1 to 8 bits")
        if dash and memory_text not in map(str, MEMORIES):
            raise SpecError(f"'tcq-{parameters}' is not a quantizer: L is one of {', '.join(map(str, MEMORIES))}")
        return cls(int(eighths), int(memory_text) if dash else STANDARD)

    @classmethod
    def palette(cls) -> tuple[TrellisCoded, ...]:
        return tuple(cls(eighths) for eighths in range(8, 65))

    def with_effort(self, effort: str) -> TrellisCoded:
        return replace(self, memory=EFFORT[effort])

    @property
    def codebook_bits(self) -> int:
        """log2 of the number of codebook entries: as many as a rate needs, few enough for a GPU's shared memory."""
        wanted = 10 if self.rate <= 4 else 12 if self.rate <= 5 else 14
        return min(wanted, self.memory)

    def shifts(self) -> torch.Tensor:
        """Bits shifted in at each step, int64 [256]; the pattern has a period of eight steps."""
        total = [floor(step * self.rate) for step in range(TILE_WEIGHTS + 1)]
        return torch.tensor(total).diff()

    def segments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(slope, intercept), float32 [32] each: |value| = slope[i] * f + intercept[i] where f = 2 v + 1 is the odd
        float made of the index's low bits v, and i the five bits of f above mantissa bit 22."""
        scale = Fraction(round(_interpolate(_SCALE, self.rate)), _SCALE_GRID)
        slopes, intercepts = torch.zeros(SEGMENTS), torch.zeros(SEGMENTS)
        for octave in range(self.codebook_bits):
            for half in range(2):
                low, width = Fraction(2 + half, 2) * 2**octave, Fraction(2**octave, 2)
                ends = [_tail_quantile(f / 2**self.codebook_bits) for f in (low, low + width)]
                slope = (ends[1] - ends[0]) / width
                index = ((127 + octave) * 2 + half) % SEGMENTS
                slopes[index] = float(scale * slope)
                intercepts[index] = float(scale * (ends[0] - slope * low))
        return slopes, intercepts

    def codebook(self) -> torch.Tensor:
        """float32 [2^codebook_bits]; the top index bit is the sign."""
        return _codebook(self)

    def state_values(self) -> torch.Tensor:
        """float32 [2^L]: the reproduction value of each state."""
        state = torch.arange(1 << self.memory)
        hashed = state * (2 * state + 1) & ((1 << self.memory) - 1)
        return self.codebook()[hashed >> (self.memory - self.codebook_bits)]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        ends = self.shifts().cumsum(0).to(codes.device)
        return self.state_values().to(codes.device)[windows(codes, ends, self.memory)]

    def pack_states(self, states: torch.Tensor) -> torch.Tensor:
        """Trellis states [tiles, 256] -> int32 codes: each step adds the k_t lowest bits of its state."""
        shifts = self.shifts()
        return pack_fields(states & ((1 << shifts) - 1).to(states.device), shifts)

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """Viterbi over all 2^L states. The circle is first cut and searched at its middle; the state that this path has
        at the true seam is then imposed on both ends of a second search."""
        shifts, half = self.shifts(), TILE_WEIGHTS // 2
        rolled, _ = self._search(tiles.roll(-half, 1), shifts.roll(-half), seam=None)
        seam = rolled[:, half] >> shifts[0]
        states, _ = self._search(tiles, shifts, seam)
        return self.pack_states(states)

    def _search(
        self, source: torch.Tensor, shifts: torch.Tensor, seam: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Best path through `source` [tiles, 256]; with `seam` [tiles] the group of states it must start and end in."""
        bits, count, steps = self.memory, source.shape[0], source.shape[1]
        values = self.state_values().to(source.device)
        rows = torch.arange(count, device=source.device)
        cost = source.new_zeros(count, 1 << (bits - int(shifts[0])))
        if seam is not None:
            cost.fill_(_UNREACHABLE)[rows, seam] = 0
        winners = []
        for t in range(steps):
            into, out = int(shifts[t]), int(shifts[(t + 1) % steps])
            arrived = cost.repeat_interleave(1 << into, dim=1)
            step_cost = (source[:, t : t + 1] - values).square_().add_(arrived)
            candidates = step_cost.view(torch.int32).reshape(count, 1 << out, -1)
            index = torch.arange(1 << out, dtype=torch.int32, device=source.device)[None, :, None]
            best = ((candidates & ~((1 << out) - 1)) | index).amin(dim=1)  # the cost's lowest bits name the candidate
            winners.append(best & ((1 << out) - 1))
            cost = (best & ~((1 << out) - 1)).view(torch.float32)
        group = cost.argmin(dim=1) if seam is None else seam
        final = cost[rows, group]
        states = torch.empty(count, steps, dtype=torch.int64, device=source.device)
        for t in range(steps - 1, -1, -1):
            out = int(shifts[(t + 1) % steps])
            states[:, t] = (winners[t][rows, group].to(torch.int64) << (bits - out)) | group
            group = states[:, t] >> shifts[t]
        return states, final


def _interpolate(at_whole_bits: tuple[float, ...], rate: Fraction) -> float:
    below = min(int(rate), len(at_whole_bits) - 1)
    part = float(rate - below)
    return at_whole_bits[below - 1] * (1 - part) + at_whole_bits[below] * part


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
