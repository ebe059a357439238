"""What every quantizer states and does. A family is one file in this folder; see CONTRIBUTING.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

import torch

from qpalette.codes.description import Decoder, Search
from qpalette.core.errors import SpecError
from qpalette.core.records import TILE_WEIGHTS


class Quantizer(ABC):
    """Maps tiles of 256 weights (unit variance, scan order) to `words_per_tile` 32-bit words and back.

    Instances are small frozen dataclasses: two equal names are equal quantizers. The methods here are the plain torch
    definition of the code, bit for bit; backends supply the fast ones and are tested against them.
    """

    family: ClassVar[str]

    @property
    @abstractmethod
    def rate(self) -> Fraction:
        """Bits per weight of the codes alone, exactly."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The canonical spec, e.g. "tcq-3.25"; `parse` of it gives an equal quantizer."""

    @property
    @abstractmethod
    def claimed_distortion(self) -> float:
        """Expected mean squared error on a unit Gaussian source, with where the figure comes from in the docstring."""

    @classmethod
    @abstractmethod
    def parse(cls, parameters: str) -> Quantizer:
        """From what follows "family-" in the name. Raises SpecError, naming the allowed values."""

    @classmethod
    @abstractmethod
    def palette(cls) -> tuple[Quantizer, ...]:
        """Every member of the family at standard effort, by rising rate."""

    @abstractmethod
    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """float32 [tiles, 256] -> int32 codes [tiles, words_per_tile]. Slow and obvious."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """int32 codes [tiles, words_per_tile] -> float32 [tiles, 256]."""

    def with_effort(self, effort: str) -> Quantizer:
        """The same rate searched "fast", "standard" or "best"; a family with nothing to search returns itself."""
        return self

    @property
    def decoder(self) -> Decoder | None:
        """How fast decoders read the code, with `entries`; None for a code that only `decode` knows."""
        return None

    def entries(self) -> torch.Tensor:
        """The table of `decoder`, float32 [2^index_bits, width]."""
        raise AssertionError(f"{self} has no decoder")

    def segments(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same table computed, where it can be: (slope, intercept), float32 [32] each, |entry| = slope[i] f +
        intercept[i] for f = 2 v + 1 the odd float made of the index without its top bit, the sign, and i the five bits
        of f above mantissa bit 22."""
        return None

    @property
    def search(self) -> Search | None:
        """The trellis that fast encoders walk; None where `encode` is no search of one."""
        return None

    @property
    def words_per_tile(self) -> int:
        words = self.rate * TILE_WEIGHTS / 32
        assert words.denominator == 1
        return int(words)

    def __str__(self) -> str:
        return self.name


@lru_cache(maxsize=256)
def entries_on(quantizer: Quantizer, device: torch.device) -> torch.Tensor:
    """`quantizer.entries()` on `device`, kept: a CUDA graph, in which an embedding's look-up may be, can hold no copy
    from the host."""
    with torch.inference_mode(False):  # made inside it, they would break a later backward pass
        return quantizer.entries().to(device)


FAMILIES: dict[str, type[Quantizer]] = {}


def register(cls: type[Quantizer]) -> type[Quantizer]:
    """Class decorator: makes a family known to `parse_spec` and to the generic tests."""
    FAMILIES[cls.family] = cls
    parse_spec.cache_clear()
    return cls


@lru_cache(maxsize=1024)
def parse_spec(name: str) -> Quantizer:
    """`"tcq-3.25"` -> the quantizer. Raises SpecError that lists the families or the allowed parameters."""
    family, dash, parameters = name.partition("-")
    if family not in FAMILIES or not dash:
        known = ", ".join(f"{cls.palette()[0]} .. {cls.palette()[-1]}" for cls in FAMILIES.values())
        raise SpecError(f"'{name}' is not a quantizer: known are {known}")
    return FAMILIES[family].parse(parameters)


def full_palette() -> tuple[Quantizer, ...]:
    """All registered quantizers at standard effort, family by family."""
    return tuple(quantizer for cls in FAMILIES.values() for quantizer in cls.palette())
