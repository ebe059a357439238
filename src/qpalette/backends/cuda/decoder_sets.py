"""Which decoders share a kernel, so that a few kernels serve every launch of a model, whatever its segments are.

A kernel holds the code of a set of decoders, and each block takes its segment's. A model that mixes 27 specs makes some
sixty different launches a token, and one kernel serves them all (benchmarks/kernel_sets.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from qpalette.backends.cuda.decoder import DecoderSpec

DecoderSet = tuple[DecoderSpec, ...]  # sorted
_expected: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def expect(codes: torch.Tensor, decoder: DecoderSpec) -> None:
    """`codes` will be multiplied with, for as long as they live."""
    _expected[codes] = decoder


class DecoderSets:
    """Of the kernels that are there, for one device and batch."""

    def __init__(self) -> None:
        self.sets: list[DecoderSet] = []

    def serving(self, needed: Iterable[DecoderSpec]) -> DecoderSet:
        """The smallest set with all of `needed`; where there is none, a new one: they, and all that is expected now."""
        wanted = frozenset(needed)
        found = [decoders for decoders in self.sets if wanted <= set(decoders)]
        if found:
            return min(found, key=len)
        self.sets.append(tuple(sorted(wanted | set(_expected.values()))))
        return self.sets[-1]
