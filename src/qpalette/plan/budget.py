"""Budgets in the units of a user, and what they leave for the linears."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, inf

from qpalette.core.errors import BudgetError, SpecError
from qpalette.core.rate import parse_rate
from qpalette.core.records import SIGNS, LinearGroup
from qpalette.plan.build import Candidate, Limits
from qpalette.plan.plan import counted_rate

SIZE, DEVICE = "a size", "a memory"
MOST_BITS = 16  # of a weight before


def spec_for_bits(
    groups: Sequence[LinearGroup], bits: str | Fraction, palette: Sequence[Candidate], diagonal: str = SIGNS
) -> str:
    """The quantizer of least distortion, alike for all linears, within `bits` per weight: a hard budget in which
    everything stored counts.

    A row scale and the input's `diagonal` cost a few hundredths of a bit, so that a budget of 4 buys a code of 3.875.
    Raises SpecError when `bits` is no rate of at most 16, or when no quantizer fits, naming the least budget.
    """
    budget = parse_rate(bits) if isinstance(bits, str) else bits
    _check(budget)
    if not any(group.linears for group in groups):
        raise SpecError("there is no linear to quantize: check include and exclude")
    counted = {rate: counted_rate(groups, rate, diagonal) for rate in {candidate.rate for candidate in palette}}
    fitting = [candidate for candidate in palette if counted[candidate.rate] <= budget]
    if not fitting:
        least = min(palette, key=lambda candidate: (candidate.rate, candidate.distortion))
        raise SpecError(
            f"{float(budget):g} bits per weight cannot hold these linears: the least is "
            f"{_rounded_up(counted[least.rate])}, {least.spec} with its scales and signs"
        )
    return min(fitting, key=lambda candidate: (candidate.distortion, candidate.rate)).spec


def _check(bits: Fraction) -> None:
    if bits > MOST_BITS:
        raise SpecError(f"{float(bits):g} bits per weight are more than the {MOST_BITS} that there are: ask for fewer")


def _rounded_up(rate: Fraction) -> str:
    """Three decimals, never below `rate`: what is printed can be asked for."""
    return f"{ceil(rate * 1000) / 1000:.3f}"


@dataclass(frozen=True)
class Overhead:
    """What a model takes besides its quantized linears, in bytes."""

    disk: int = 0  # other tensors, headers, config, tokenizer, documents
    memory: int = 0  # other tensors, key-value cache, activations


@dataclass(frozen=True)
class Budget:
    """Hard limits, any combination: bits per weight, bytes on disk, bytes of device memory, tokens per second."""

    bits: Fraction | None = None
    size: int | None = None
    memory: int | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        if (self.bits, self.size, self.memory, self.tokens_per_second) == (None,) * 4:
            raise SpecError("give a budget: bits, a size, a memory or tokens per second")
        if self.bits is not None:
            _check(self.bits)
        if self.tokens_per_second is not None and not 0 < self.tokens_per_second < inf:
            raise SpecError(f"tokens per second must be a positive number, got {self.tokens_per_second}")

    def limits(self, weights: int, overhead: Overhead, streams: bool = False) -> Limits:
        """The same for the linears alone, or with `streams` of a cache in the memory; 0 bits where the rest of the
        model is too large already."""
        allowed = {what: 8 * max(0, limit - taken) for what, limit, taken in self._bytes(overhead)}
        memory = allowed.pop(DEVICE, None) if streams else None
        if self.bits is not None:
            allowed["bits"] = floor(self.bits * weights)
        seconds = None if self.tokens_per_second is None else 1 / self.tokens_per_second
        return Limits(min(allowed.values(), default=None), seconds, memory)

    def explain(self, error: BudgetError, weights: int, overhead: Overhead) -> BudgetError:
        """The least that is possible, in the units that were asked for."""
        parts = []
        if error.least_memory is not None:
            parts += [f"the least is {DEVICE} of {readable(-(-error.least_memory // 8) + overhead.memory, up=True)}"]
        if error.least_bits is not None:
            parts += [f"the least is {_rounded_up(Fraction(error.least_bits, weights))} bits per weight"]
            least = -(-error.least_bits // 8)
            parts += [
                f"{name} of {readable(least + taken, up=True)} (the linears take {readable(least, up=True)} of it)"
                for name, _, taken in self._bytes(overhead)
            ]
            if error.least_seconds is None and self.tokens_per_second is not None:
                parts.append(f"if not at {self.tokens_per_second:g} tokens/s")
        elif error.least_seconds is not None:
            parts += [f"the most is {floor(100 / error.least_seconds) / 100:g} tokens/s"]
        message = f"nothing fits {self}: {', '.join(parts) or error}"
        return BudgetError(message, error.least_bits, error.least_seconds, error.least_memory)

    def _bytes(self, overhead: Overhead) -> list[tuple[str, int, int]]:
        pairs = ((SIZE, self.size, overhead.disk), (DEVICE, self.memory, overhead.memory))
        return [(name, limit, taken) for name, limit, taken in pairs if limit is not None]

    def __str__(self) -> str:
        parts = {
            "bits per weight": None if self.bits is None else f"{float(self.bits):g}",
            "on disk": None if self.size is None else readable(self.size),
            "of memory": None if self.memory is None else readable(self.memory),
            "tokens/s": None if self.tokens_per_second is None else f"{self.tokens_per_second:g}",
        }
        return ", ".join(f"{value} {name}" for name, value in parts.items() if value is not None)


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """ "6GB" -> 6,000,000,000; "6GiB" -> 6 * 2^30; "800 MB", "1.5G", "123456". Raises SpecError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SpecError(f"'{text[:60]}' is not a size: write 6GB (10^9 bytes), 6GiB (2^30), 800MB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper() or " ")
    return floor(Fraction(number) * (1024 if binary else 1000) ** power)


def readable(nbytes: int, up: bool = False) -> str:
    """Four digits, which `parse_size` reads; with `up` never below `nbytes`."""
    power = min(4, (len(str(nbytes)) - 1) // 3)
    scaled = Fraction(nbytes, 1000**power)
    rounded = ceil(scaled * 1000) if up else round(scaled * 1000)
    return f"{rounded / 1000:g} {' kMGT'[power].strip()}B"
