"""Optimal allocation of bits to Gaussian sources: reverse water-filling.

Source: Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 10.3.3, with a weight for each source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """The optimum: bits per weight of each linear, the loss it predicts, and the price of a bit."""

    rates: tuple[float, ...]
    predicted_loss: float
    multiplier: float  # -d(predicted_loss)/d(budget_bits): loss saved by one more bit


def reverse_water_filling(sensitivities: Sequence[float], weights: Sequence[float], budget_bits: float) -> Allocation:
    """Minimise sum a_l 2^(-2 R_l) subject to sum m_l R_l <= budget_bits and R_l >= 0, exactly.

    `sensitivities` a_l: loss per unit of distortion, not negative; `weights` m_l: number of weights of each linear,
    positive; `budget_bits`: all bits together. With the multiplier mu the optimum is
    R_l = max(0, log2(2 ln2 a_l / (mu m_l)) / 2). The linears with a rate above 0 are those of largest a_l / m_l, so
    the multiplier has a closed form once sorted. The budget is used up, unless every sensitivity is 0.

    Raises ValueError naming the argument that is empty, of another length, negative or not finite.
    """
    _check(sensitivities, weights, budget_bits)
    levels = [math.log2(a) - math.log2(m) if a > 0 else -math.inf for a, m in zip(sensitivities, weights, strict=True)]
    water = _water_level(levels, weights, budget_bits)
    rates = tuple(max(0.0, (level - water) / 2) if level > -math.inf else 0.0 for level in levels)
    loss = math.fsum(a * 2.0 ** (-2 * rate) for a, rate in zip(sensitivities, rates, strict=True))
    return Allocation(rates, loss, 2 * math.log(2) * 2.0**water)


def _water_level(levels: Sequence[float], weights: Sequence[float], budget_bits: float) -> float:
    """log2(mu / (2 ln2)), such that the linears whose log2(a/m) lies above it use the budget."""
    water, total, filled = -math.inf, 0.0, 0.0
    for level, weight in sorted(zip(levels, weights, strict=True), reverse=True):
        if level <= water or level == -math.inf:
            break
        total, filled = total + weight, filled + weight * level
        water = (filled - 2 * budget_bits) / total
    return water


def _check(sensitivities: Sequence[float], weights: Sequence[float], budget_bits: float) -> None:
    if len(sensitivities) == 0:
        raise ValueError("sensitivities is empty: there is nothing to allocate bits to")
    if len(weights) != len(sensitivities):
        raise ValueError(f"weights has {len(weights)} entries, sensitivities has {len(sensitivities)}")
    for i, a in enumerate(sensitivities):
        if not 0 <= a < math.inf:
            raise ValueError(f"sensitivities[{i}] must be finite and not negative, got {a}")
    for i, m in enumerate(weights):
        if not 0 < m < math.inf:
            raise ValueError(f"weights[{i}] must be finite and positive, got {m}")
    if not 0 <= budget_bits < math.inf:
        raise ValueError(f"budget_bits must be finite and not negative, got {budget_bits}")
