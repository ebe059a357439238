"""Experts of a layer in tiers, which share their specs: nearly as good as specs of their own, and few kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

TIERS = 3


def tiers_of(sensitivities: Sequence[float], tiers: int = TIERS) -> list[int]:
    """The tier of each expert, 0 the least sensitive: with a rate for each tier instead of each expert, the loss at the
    same bits is least.

    Where D = 2^(-2R), the best rates make all terms of sum a_e D(R_t) one: n experts at a mean of R bits lose
    n 2^(-2R) exp(sum over tiers of n_t log(mean a of the tier) / n). Tiers are runs of the sorted sensitivities, found
    by dynamic programming over where they end. What costs nothing counts as a millionth of the most.
    """
    order = sorted(range(len(sensitivities)), key=lambda expert: sensitivities[expert])
    floor = 1e-6 * max(sensitivities, default=0.0) or 1.0
    until = [0.0]
    for expert in order:
        until.append(until[-1] + max(sensitivities[expert], floor))
    count = len(order)

    def cost(start: int, end: int) -> float:
        return (end - start) * math.log((until[end] - until[start]) / (end - start)) if start < end else 0.0

    best = [cost(0, end) for end in range(count + 1)]
    cuts: list[list[int]] = [[0] * (count + 1)]
    for _ in range(1, tiers):
        starts = [min(range(end + 1), key=lambda s: best[s] + cost(s, end)) for end in range(count + 1)]
        best = [best[start] + cost(start, end) for end, start in enumerate(starts)]
        cuts.append(starts)
    found, end = [0] * count, count
    for tier in reversed(range(tiers)):
        start = cuts[tier][end]
        for place in range(start, end):
            found[order[place]] = tier
        end = start
    return found
