"""The bitshift trellis (QTIP, arXiv 2406.11235, section 3) with rate patterns and tail-biting: tcq and tcq2 share it.

- A tile's stream is a circle of 256 R bits. Step t shifts in k_t bits and emits one or two weights; k_t follows a
  pattern whose mean is exactly the rate: fractional rates share one trellis, whose search spends bits where they help.
- The state after a step is the last L bits of the stream ("memory" L). Nothing else is stored: the stream is a circle.
- A state's value comes from a codebook, at the top bits of h = s (2 s + 1) mod 2^L. This quadratic permutation uses
  every entry equally often. (s^2 + s is two-to-one: 1.2 % more distortion at 2 bits, 1.6 % at 3.25; tcq, L = 16.)
- The top bit of h is a sign. Flipping the oldest bit of a state flips it, and it alone: opposite states have opposite
  values, which halves what an encoder has to load.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, Self

import torch

from qpalette.codes.base import Quantizer
from qpalette.codes.bits import pack_fields, windows
from qpalette.codes.description import LANE_WEIGHTS, Decoder, Search
from qpalette.codes.distortions import distortions
from qpalette.core.errors import SpecError
from qpalette.core.rate import format_rate, parse_rate
from qpalette.core.records import TILE_WEIGHTS

EFFORT = {"fast": 12, "standard": 16, "best": 18}  # names of trellis memories
MEMORIES = (12, 16, 18, 20)
STANDARD = EFFORT["standard"]
SCALE_GRID = 64
_UNREACHABLE = 1e30


@dataclass(frozen=True)
class Trellis(Quantizer):
    """A rate of `eighths` / 8 bits, and a trellis whose state is `memory` bits."""

    values_per_step: ClassVar[int]
    least_eighths: ClassVar[int] = 8
    most_eighths: ClassVar[int]
    best_scale: ClassVar[tuple[int, ...]]  # of the codebook, in 1/64, at 1, 2, .. bits
    eighths: int
    memory: int = STANDARD

    @property
    def rate(self) -> Fraction:
        return Fraction(self.eighths, 8)

    @property
    def scale(self) -> Fraction:
        """Of the codebook at this rate; a small fraction, so that products with it are the same on every machine."""
        return Fraction(round(at_rate(self.best_scale, self.rate)), SCALE_GRID)

    @property
    def name(self) -> str:
        suffix = "" if self.memory == STANDARD else f"-L{self.memory}"
        return f"{self.family}-{format_rate(self.rate)}{suffix}"

    @property
    def claimed_distortion(self) -> float:
        """Measured, each member by itself, but for some at L = 20: `distortions.py` says how, and how closely."""
        return distortions()[self.name]

    @classmethod
    def parse(cls, parameters: str) -> Self:
        rate_text, dash, memory_text = parameters.partition("-L")
        eighths = parse_rate(rate_text) * 8
        least, most = (format_rate(Fraction(limit, 8)) for limit in (cls.least_eighths, cls.most_eighths))
        if eighths.denominator != 1 or not cls.least_eighths <= eighths <= cls.most_eighths:
            raise SpecError(
                f"'{cls.family}-{parameters[:60]}' is not a quantizer: "
                f"{cls.family} takes multiples of 0.125 from {least} to {most} bits"
            )
        if dash and memory_text not in map(str, MEMORIES):
            raise SpecError(
                f"'{cls.family}-{parameters[:60]}' is not a quantizer: L is one of {', '.join(map(str, MEMORIES))}"
            )
        return cls(int(eighths), int(memory_text) if dash else STANDARD)

    @classmethod
    def palette(cls) -> tuple[Self, ...]:
        return tuple(cls(eighths) for eighths in range(cls.least_eighths, cls.most_eighths + 1))

    def with_effort(self, effort: str) -> Self:
        return replace(self, memory=EFFORT[effort])

    @property
    def steps(self) -> int:
        return TILE_WEIGHTS // self.values_per_step

    def shifts(self) -> torch.Tensor:
        """Bits shifted in at each step, int64 [steps]; the pattern repeats every eight weights."""
        return _shifts_on(self, torch.device("cpu"))

    @property
    @abstractmethod
    def index_bits(self) -> int:
        """log2 of the number of entries, the sign among them."""

    @property
    def decoder(self) -> Decoder:
        shifts = tuple(self.shifts()[: LANE_WEIGHTS // self.values_per_step].tolist())
        return Decoder(shifts, self.values_per_step, self.memory, self.index_bits, hashed=True)

    @property
    def search(self) -> Search:
        shifts = tuple(self.shifts().tolist())
        return Search(self.memory, shifts, float(self.scale), self.state_values_on, self.pack_states)

    def state_values(self) -> torch.Tensor:
        """float32 [2^L, values_per_step]: what each state stands for."""
        return self.entries()[self.hashed_states() >> (self.memory - self.index_bits)]

    def state_values_on(self, device: torch.device) -> torch.Tensor:
        """`state_values` on `device`, kept: encoding with feedback asks for them at every block of columns."""
        return _state_values_on(self, device)

    def hashed_states(self) -> torch.Tensor:
        """h of every state, int64 [2^L]."""
        state = torch.arange(1 << self.memory)
        return state * (2 * state + 1) & ((1 << self.memory) - 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        states = windows(codes, _ends_on(self, codes.device), self.memory)
        return self.state_values_on(codes.device)[states].reshape(codes.shape[0], TILE_WEIGHTS)

    def pack_states(self, states: torch.Tensor) -> torch.Tensor:
        """Trellis states [tiles, steps] -> int32 codes: each step adds the k_t lowest bits of its state."""
        return pack_fields(states & ((1 << _shifts_on(self, states.device)) - 1), self.shifts())

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """Viterbi over all 2^L states. The circle is first cut and searched at its middle; the state that this path has
        at the true seam is then imposed on both ends of a second search."""
        source = tiles.reshape(tiles.shape[0], self.steps, self.values_per_step)
        shifts, half = self.shifts(), self.steps // 2
        rolled = self._search(source.roll(-half, 1), shifts.roll(-half), seam=None)
        return self.pack_states(self._search(source, shifts, seam=rolled[:, half] >> shifts[0]))

    def _search(self, source: torch.Tensor, shifts: torch.Tensor, seam: torch.Tensor | None) -> torch.Tensor:
        """States [tiles, steps] of the best path through `source` [tiles, steps, values_per_step]; with `seam` [tiles]
        the group of states that it must start and end in."""
        bits, (count, steps, _) = self.memory, source.shape
        values = self.state_values().to(source.device)
        rows = torch.arange(count, device=source.device)
        cost = source.new_zeros(count, 1 << (bits - int(shifts[0])))
        if seam is not None:
            cost.fill_(_UNREACHABLE)[rows, seam] = 0
        winners = []
        for t in range(steps):
            into, out = int(shifts[t]), int(shifts[(t + 1) % steps])
            arrived = cost.repeat_interleave(1 << into, dim=1)
            squares = (source[:, t, None, :] - values).square_().unbind(-1)
            step_cost = sum(squares[1:], start=squares[0]).add_(arrived)
            candidates = step_cost.view(torch.int32).reshape(count, 1 << out, -1)
            index = torch.arange(1 << out, dtype=torch.int32, device=source.device)[None, :, None]
            best = ((candidates & ~((1 << out) - 1)) | index).amin(dim=1)  # the cost's lowest bits name the candidate
            winners.append(best & ((1 << out) - 1))
            cost = (best & ~((1 << out) - 1)).view(torch.float32)
        group = cost.argmin(dim=1) if seam is None else seam
        states = torch.empty(count, steps, dtype=torch.int64, device=source.device)
        for t in range(steps - 1, -1, -1):
            out = int(shifts[(t + 1) % steps])
            states[:, t] = (winners[t][rows, group].to(torch.int64) << (bits - out)) | group
            group = states[:, t] >> shifts[t]
        return states


@lru_cache(maxsize=64)
def _state_values_on(quantizer: Trellis, device: torch.device) -> torch.Tensor:
    return quantizer.state_values().to(device).contiguous()


# Calibrated rounding encodes 16 columns at a time: what follows is asked for thousands of times per matrix.
@lru_cache(maxsize=256)
def _shifts_on(quantizer: Trellis, device: torch.device) -> torch.Tensor:
    total = [step * quantizer.values_per_step * quantizer.eighths // 8 for step in range(quantizer.steps + 1)]
    return torch.tensor(total).diff().to(device)


@lru_cache(maxsize=256)
def _ends_on(quantizer: Trellis, device: torch.device) -> torch.Tensor:
    """Where each step ends in the stream, in bits."""
    return quantizer.shifts().cumsum(0).to(device)


def at_rate(at_whole_bits: tuple[float, ...], rate: Fraction) -> float:
    """Linear interpolation of figures given at 1, 2, .. bits."""
    below = max(1, min(int(rate), len(at_whole_bits) - 1))
    part = float(rate - below)
    return at_whole_bits[below - 1] * (1 - part) + at_whole_bits[below] * part
