"""From a budget in bits to a quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from qpalette.core.errors import SpecError
from qpalette.core.rate import parse_rate
from qpalette.core.records import LinearGroup
from qpalette.plan.plan import counted_rate
from qpalette.quantizers.tcq import TrellisCoded
from qpalette.quantizers.trellis import EFFORT


def spec_for_bits(groups: Sequence[LinearGroup], bits: str | Fraction, effort: str = "standard") -> str:
    """The best uniform quantizer within `bits` per weight, a hard budget in which everything stored counts.

    A row scale and the signs cost a few hundredths of a bit, so that a budget of 4 buys tcq-3.875.
    Raises SpecError when `bits` is no rate, no quantizer fits (naming the least budget), or `effort` is unknown.
    """
    if effort not in EFFORT:
        raise SpecError(f"'{effort}' is not an effort: choose {', '.join(EFFORT)}")
    budget = parse_rate(bits) if isinstance(bits, str) else bits
    palette = TrellisCoded.palette()
    if not any(group.linears for group in groups):
        raise SpecError("there is no linear to quantize: check include and exclude")
    fitting = [quantizer for quantizer in palette if counted_rate(groups, quantizer.rate) <= budget]
    if not fitting:
        least = counted_rate(groups, palette[0].rate)
        raise SpecError(
            f"{float(budget):g} bits per weight cannot hold these linears: the least is {_rounded_up(least)}, "
            f"{palette[0].name} with its scales and signs"
        )
    return fitting[-1].with_effort(effort).name


def _rounded_up(rate: Fraction) -> str:
    """Three decimals, never below `rate`: what is printed can be asked for."""
    return f"{ceil(rate * 1000) / 1000:.3f}"
