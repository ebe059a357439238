"""Lagrangian relaxation: a price for each resource, by bisection. Fast, with a bound; and the whole Pareto front.

Source: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans. ASSP 36 (1988);
with several resources the search is nested (Everett, Operations Research 11, 1963).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qpalette.plan.problem import Floats, Problem, Relaxed, Selection

STEPS = 60  # of a bisection in the logarithm of a price
PRECISION = 1e-9  # relative, of a price: then two neighbouring solutions are all that is left
RISES = 40  # of a price, eightfold each, before it counts as infinite


@dataclass(frozen=True)
class Relaxation:
    """The best that was found: a selection within the limits, None if the search met none, and a bound on all."""

    selection: Selection | None
    tightest: Relaxed  # the one with the highest bound

    @property
    def bound(self) -> float:
        return self.tightest.bound


def solve_lagrangian(problem: Problem) -> Relaxation:
    """A selection within the limits whose loss is, with many linears, a hair above the bound that comes with it."""
    search = _Search(problem)
    search.tighten(0, np.zeros(len(problem.resources)))
    best = None if search.best is None else fill(problem, search.best)
    return Relaxation(best, search.tightest)


class _Search:
    """Visits prices, and keeps the best selection within the limits and the highest bound."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.tightest = self._visit(np.zeros(len(problem.resources)))
        self.best: Selection | None = self._within(self.tightest.selection)

    def tighten(self, r: int, prices: Floats) -> Selection:
        """The selection at the least price of resource `r` that keeps it within its limit, later ones likewise."""
        if r == len(prices):
            return self.visit(prices)
        limit = self.problem.limits[r]

        def at(price: float) -> Selection:
            return self.tighten(r + 1, np.concatenate([prices[:r], [price], prices[r + 1 :]]))

        found = at(0.0)
        if found.costs[r] <= limit:
            return found
        low, high = 0.0, 1e-6 * (self.problem.loss.max() or 1.0) / (self.problem.costs[:, r].max() or 1.0)
        for _ in range(RISES):
            found = at(high)
            if found.costs[r] <= limit:
                break
            low, high = high, 8 * high
        else:
            return found  # the limits are met together at no price
        for _ in range(STEPS):
            if high <= low * (1 + PRECISION):
                break
            middle = np.sqrt(low * high) if low > 0 else high / 64
            candidate = at(middle)
            if candidate.costs[r] <= limit:
                high, found = middle, candidate
            else:
                low = middle
        return found

    def visit(self, prices: Floats) -> Selection:
        relaxed = self._visit(prices)
        if relaxed.bound > self.tightest.bound:
            self.tightest = relaxed
        selection = self._within(relaxed.selection)
        if selection is not None and (self.best is None or selection.loss < self.best.loss):
            self.best = selection
        return relaxed.selection

    def _visit(self, prices: Floats) -> Relaxed:
        return self.problem.relax(prices)

    def _within(self, selection: Selection) -> Selection | None:
        return selection if self.problem.within_limits(selection) else None


def fill(problem: Problem, selection: Selection) -> Selection:
    """Spend what is left: the exchange of one option that saves most loss and fits, until there is none."""
    chosen = dict(zip(problem.segment_of_option[selection.options].tolist(), selection.options.tolist(), strict=True))
    inside = np.flatnonzero(np.isin(problem.segment_of_option, list(chosen)))  # options of the chosen segments
    position = np.array([chosen[s] for s in problem.segment_of_option[inside].tolist()])
    current = selection
    while True:
        gain = problem.loss[position] - problem.loss[inside]
        fits = (problem.costs[inside] - problem.costs[position] <= problem.limits - current.costs).all(1)
        gain[~fits] = 0
        best = int(gain.argmax())
        if gain[best] <= 0:
            return current
        segment = int(problem.segment_of_option[inside[best]])
        chosen[segment] = int(inside[best])
        position[problem.segment_of_option[inside] == segment] = inside[best]
        following = problem.selection(np.array(list(chosen.values())))
        if not problem.within_limits(following):  # rounding of the sums
            return current
        current = following


def pareto_front(problem: Problem, resource: int = 0, points: int = 64) -> list[Selection]:
    """Selections of least loss for their cost in one resource, by rising cost: corners of the convex hull.

    The limits are not looked at: prices run from where the cheapest selection is best to where the best one is.
    """
    cost = problem.costs[:, resource]
    spread = problem.loss.max() / cost[cost > 0].min()
    prices = np.zeros(len(problem.resources))
    found: dict[float, Selection] = {}
    cheapest = problem.least[resource]
    high = spread
    for _ in range(200):
        prices[resource] = high
        if problem.relax(prices).selection.costs[resource] <= cheapest * (1 + 1e-12):
            break
        high *= 4
    prices[resource] = 0
    dearest = problem.relax(prices).selection
    low = high
    while low > 1e-30 * high:
        low /= 4
        prices[resource] = low
        if problem.relax(prices).selection.loss <= dearest.loss * (1 + 1e-9):
            break
    for price in np.geomspace(high, low, points):
        prices[resource] = price
        selection = problem.relax(prices).selection
        found.setdefault(float(selection.costs[resource]), selection)
    return [found[key] for key in sorted(found)]
