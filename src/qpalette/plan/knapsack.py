"""The multiple-choice knapsack over whole numbers, exactly, by dynamic programming.

Source: Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), section 11.5. Stored bits differ between options by
multiples of an eighth of a bit per weight: in units of their greatest common divisor a budget is a short table.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from qpalette.plan.problem import Problem, Selection

MOST_CELLS = 1 << 28  # of the table of choices, a byte or two each


def table_cells(problem: Problem, kept: np.ndarray) -> int | None:
    """How large a table the problem needs; None when it is no such knapsack."""
    if len(problem.resources) != 1 or len(problem.segments) != len(problem.blocks):
        return None
    costs = problem.costs[kept, 0]
    if not np.array_equal(costs, np.rint(costs)):
        return None
    _, capacity = _scaled(problem, kept)
    return len(problem.segments) * (capacity + 1)


def solve_knapsack(problem: Problem, kept: np.ndarray) -> Selection | None:
    """The best selection among the `kept` options; None when none is within the limit."""
    options = np.flatnonzero(kept)
    segment = problem.segment_of_option[options]
    if len(np.unique(segment)) < len(problem.segments):
        return None
    weights, capacity = _scaled(problem, kept)
    if capacity < 0:
        return None
    starts = np.searchsorted(segment, np.arange(len(problem.segments) + 1))
    least = np.zeros(capacity + 1)  # loss of the segments so far, by units that may be used
    choices = []
    for first, last in pairwise(starts.tolist()):
        following = np.full(capacity + 1, np.inf)
        choice = np.zeros(capacity + 1, dtype=np.uint16)
        for place, (weight, loss) in enumerate(
            zip(weights[first:last].tolist(), problem.loss[options[first:last]].tolist(), strict=True)
        ):
            if weight > capacity:
                continue
            candidate = least[: capacity + 1 - weight] + loss
            better = candidate < following[weight:]
            following[weight:][better] = candidate[better]
            choice[weight:][better] = place
        choices.append(choice)
        least = following
    chosen, left = np.zeros(len(problem.segments), dtype=np.int64), capacity
    for s in range(len(problem.segments) - 1, -1, -1):
        position = starts[s] + choices[s][left]
        chosen[s] = options[position]
        left -= int(weights[position])
    return problem.selection(chosen)


def _scaled(problem: Problem, kept: np.ndarray) -> tuple[np.ndarray, int]:
    """Costs above each segment's cheapest kept option, and what the limit leaves for them, in common units."""
    options = np.flatnonzero(kept)
    costs = problem.costs[options, 0].astype(np.int64)
    segment = problem.segment_of_option[options]
    cheapest = np.full(len(problem.segments), np.iinfo(np.int64).max)
    np.minimum.at(cheapest, segment, costs)
    above = costs - cheapest[segment]
    unit = int(np.gcd.reduce(above)) or 1
    dearest = np.zeros(len(problem.segments), dtype=np.int64)
    np.maximum.at(dearest, segment, above)
    room = int(problem.limits[0]) - int(cheapest[np.unique(segment)].sum())
    return above // unit, min(room, int(dearest.sum())) // unit
