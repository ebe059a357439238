"""Both solvers against brute force, against each other, and against the limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpalette.core.errors import SpecError
from qpalette.plan import exact
from qpalette.plan.exact import solve
from qpalette.plan.knapsack import table_cells
from qpalette.plan.lagrangian import pareto_front, solve_lagrangian
from qpalette.plan.problem import Problem, Segment, Variant


def segment(name: str, loss, costs) -> Segment:
    loss, costs = np.array(loss, dtype=float), np.array(costs, dtype=float)
    return Segment((name,), tuple(f"{name}{i}" for i in range(len(loss))), loss, costs.reshape(len(loss), -1))


def brute_force(problem: Problem) -> float | None:
    """The least loss within the limits, over every choice there is."""
    best = None
    for variants in itertools.product(*problem.blocks):
        segments = [part for variant in variants for part in variant.segments]
        for choice in itertools.product(*(range(len(part.specs)) for part in segments)):
            costs = sum(part.costs[i] for part, i in zip(segments, choice, strict=True))
            if (costs <= problem.limits).all():
                loss = sum(part.loss[i] for part, i in zip(segments, choice, strict=True))
                best = loss if best is None else min(best, loss)
    return best


@st.composite
def problems(draw, resources: int, variants: int) -> Problem:
    def a_segment(name: str) -> Segment:
        options = draw(st.integers(1, 4))
        loss = draw(st.lists(st.integers(0, 1000), min_size=options, max_size=options))
        size = options * resources
        costs = np.array(draw(st.lists(st.integers(1, 50), min_size=size, max_size=size)), dtype=float)
        return segment(name, loss, costs.reshape(options, resources) * (1 if resources == 1 else 0.1))

    blocks = []
    for block in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, variants))
        parts = [1 if variants == 1 else draw(st.integers(1, 2)) for _ in range(count)]
        blocks.append(tuple(Variant(tuple(a_segment(f"{block}{v}{s}") for s in range(parts[v]))) for v in range(count)))
    share = draw(st.floats(0.02, 1.1))
    largest = Problem(blocks, ["x"] * resources, [0.0] * resources).costs.sum(0)
    return Problem(blocks, ["x"] * resources, share * largest)


def check(problem: Problem) -> None:
    best, solved, relaxed = brute_force(problem), solve(problem), solve_lagrangian(problem)
    if best is None:
        assert solved is None
        assert relaxed.selection is None
        return
    assert solved is not None
    assert problem.within_limits(solved.selection)
    # sums of at most 12 numbers below 1000 in another order: 12 roundings of 2^-53 each
    rounding = 12 * 1000 * 2**-52
    assert best - rounding <= solved.selection.loss <= best * (1 + exact.GAP) + rounding
    assert solved.bound <= best + rounding
    assert relaxed.bound <= best + rounding * (1 + best)
    if relaxed.selection is not None:
        assert problem.within_limits(relaxed.selection)
        assert relaxed.selection.loss >= best - rounding


@settings(max_examples=150, deadline=None)
@given(problems(resources=1, variants=1))
def test_knapsack_is_exact(problem):
    assert table_cells(problem, np.ones(len(problem.loss), dtype=bool)) is not None
    check(problem)


@settings(max_examples=60, deadline=None)
@given(problems(resources=1, variants=3))
def test_variants_are_exact(problem):
    check(problem)


@settings(max_examples=60, deadline=None)
@given(problems(resources=2, variants=3))
def test_two_limits_are_exact(problem):
    check(problem)


def random_knapsack(blocks: int, seed: int) -> Problem:
    """Log-normal sensitivities, distortions 4^-bits, sizes of real layers."""
    random = np.random.default_rng(seed)
    rates = np.arange(8, 65) / 8
    parts = []
    for i in range(blocks):
        size = random.choice([1, 4, 14]) * 2**20
        parts.append((Variant((segment(f"s{i}-", random.lognormal(0, 2) * 4.0**-rates, size * rates),)),))
    weights = sum(part[0].segments[0].costs.max() for part in parts) / 8
    return Problem(parts, ["bits"], [3.1 * weights])


@pytest.mark.parametrize("seed", range(3))
def test_dynamic_programming_and_highs_agree(seed, monkeypatch):
    problem = random_knapsack(40, seed)
    by_table = solve(problem)
    monkeypatch.setattr(exact, "MOST_CELLS", 0)
    by_highs = solve(problem)
    assert by_table.gap == 0
    assert by_highs.gap <= exact.GAP
    assert by_highs.selection.loss == pytest.approx(by_table.selection.loss, rel=2 * exact.GAP)


@pytest.mark.parametrize("seed", range(3))
def test_lagrangian_agrees_within_its_gap(seed):
    problem = random_knapsack(200, seed)
    best, near = solve(problem), solve(problem, "lagrangian")
    assert near.bound <= best.selection.loss <= near.selection.loss
    assert near.selection.loss * (1 - near.gap) <= best.selection.loss
    assert near.gap < 0.01


def test_the_front_falls_is_convex_and_holds_lagrangian_optima():
    problem = random_knapsack(30, 5)
    front = pareto_front(problem)
    cost, loss = (np.array(figures) for figures in zip(*((s.costs[0], s.loss) for s in front), strict=True))
    assert len(front) > 20
    assert (np.diff(cost) > 0).all()
    assert (np.diff(loss) < 0).all()
    slopes = np.diff(loss) / np.diff(cost)
    assert (np.diff(slopes) >= -1e-9 * np.abs(slopes[:-1])).all()
    assert cost[0] == problem.least[0], "the front begins at the cheapest choice"
    middle = front[len(front) // 2]
    at_point = Problem(problem.blocks, ["bits"], [middle.costs[0]])
    assert solve(at_point).selection.loss == pytest.approx(middle.loss, rel=1e-12), "a corner of the hull is optimal"


def test_impossible_and_unknown():
    problem = Problem([(Variant((segment("a", [1.0], [5.0]),)),)], ["bits"], [4.0])
    assert solve(problem) is None
    assert problem.least == 5
    with pytest.raises(SpecError, match="no solver"):
        solve(problem, "guess")
    with pytest.raises(ValueError, match="needs blocks"):
        Problem([], ["bits"], [1.0])
