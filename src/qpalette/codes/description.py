"""What a backend needs to know of a code, as plain data: it reads this, and matches on no class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

LANE_WEIGHTS = 8  # consecutive steps of the scan order that a lane of a GPU owns: a whole number of bits at every rate


@dataclass(frozen=True)
class Decoder:
    """How the circle of bits of a tile becomes weights: at each step some bits enter a window, the window gives an
    index, and the index an entry of a table (`Quantizer.entries`).

    shifts: bits that enter at each step of LANE_WEIGHTS weights; the pattern repeats over the tile.
    width: weights per entry, 1 or 2; LANE_WEIGHTS / width steps.
    memory: bits of the window s, the last ones of the stream.
    index_bits: the index is the top bits of s (2 s + 1) mod 2^memory where `hashed`, else the window itself.
    """

    shifts: tuple[int, ...]
    width: int
    memory: int
    index_bits: int
    hashed: bool

    def __post_init__(self) -> None:
        assert len(self.shifts) * self.width == LANE_WEIGHTS
        assert self.hashed or self.memory == self.index_bits

    @property
    def lane_bits(self) -> int:
        """Of LANE_WEIGHTS weights: eight times the rate."""
        return sum(self.shifts)


@dataclass(frozen=True)
class Search:
    """What an encoder walks: the trellis whose state after a step is the last `memory` bits of the stream.

    shifts: bits that enter at each step of a tile; they take at most two neighbouring values.
    values: device -> float32 [2^memory, width], what each state stands for; opposite states (the oldest bit flipped)
    have opposite values, and pairs are float16 numbers times `scale`.
    pack: states, integer [tiles, steps] -> int32 codes [tiles, words].
    """

    memory: int
    shifts: tuple[int, ...]
    scale: float
    values: Callable[[torch.device], torch.Tensor] = field(compare=False)
    pack: Callable[[torch.Tensor], torch.Tensor] = field(compare=False)
