from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from qpalette.theory import reverse_water_filling

linears = st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(1, 10**9)), min_size=1, max_size=12)


@given(linears, st.floats(0, 20))
def test_kkt_conditions_hold_and_the_budget_is_used(pairs, average):
    a, m = map(np.array, zip(*pairs, strict=True))
    budget = average * float(m.sum())
    result = reverse_water_filling(a, m, budget)
    rates = np.array(result.rates)
    assert (rates >= 0).all()
    # A rate is half a difference of two base-2 logarithms, each below 64 for these inputs, hence rounded by 64 eps.
    assert rates @ m == pytest.approx(budget, rel=1e-12, abs=64 * 2**-52 * float(m.sum()))
    # d(loss)/d(bit) of a linear is the multiplier where bits are spent, and no larger where none are.
    saved = 2 * math.log(2) * a * 2 ** (-2 * rates) / m
    assert saved[rates > 0] == pytest.approx(result.multiplier, rel=1e-9)
    assert (saved <= result.multiplier * (1 + 1e-9)).all()
    assert result.predicted_loss == pytest.approx(float(a @ 2 ** (-2 * rates)))


def test_loss_is_convex_in_the_budget_and_its_slope_is_the_multiplier():
    a, m = [5.0, 1.0, 0.02, 0.3], [10, 40, 25, 7]
    budgets = np.linspace(0, 400, 201)
    results = [reverse_water_filling(a, m, b) for b in budgets]
    losses = np.array([r.predicted_loss for r in results])
    assert losses[0] == pytest.approx(sum(a))
    assert (np.diff(losses) < 0).all()
    assert (np.diff(losses, 2) > -1e-12).all()
    slope = np.gradient(losses, budgets)[2:-2]
    assert -slope == pytest.approx([r.multiplier for r in results[2:-2]], rel=0.05)


def test_agrees_with_a_general_solver():
    a, m, budget = np.array([3.0, 0.5, 0.001, 1.2]), np.array([4.0, 2.0, 8.0, 1.0]), 14.0
    solution = optimize.minimize(
        lambda r: a @ 2 ** (-2 * r),
        np.full(4, budget / m.sum()),
        jac=lambda r: -2 * math.log(2) * a * 2 ** (-2 * r),
        bounds=[(0, None)] * 4,
        constraints={"type": "ineq", "fun": lambda r: budget - m @ r},
        options={"ftol": 1e-14},
    )
    result = reverse_water_filling(a, m, budget)
    assert result.rates[2] == 0
    assert result.rates == pytest.approx(tuple(solution.x), abs=1e-4)
    assert result.predicted_loss == pytest.approx(solution.fun, rel=1e-8)


@pytest.mark.parametrize("average", [0.0, 0.5, 3.25])
def test_uniform_when_sensitivities_are_proportional_to_weights(average):
    m = [3, 50, 700]
    result = reverse_water_filling([0.2 * x for x in m], m, average * sum(m))
    assert result.rates == pytest.approx((average,) * 3, abs=1e-12)


def test_linears_without_sensitivity_get_nothing():
    result = reverse_water_filling([0.0, 1.0], [10, 10], 30)
    assert result.rates == pytest.approx((0.0, 3.0))
    nothing = reverse_water_filling([0.0, 0.0], [10, 10], 30)
    assert (nothing.rates, nothing.predicted_loss, nothing.multiplier) == ((0.0, 0.0), 0.0, 0.0)


@pytest.mark.parametrize(
    ("a", "m", "budget", "name"),
    [
        ([], [], 1, "sensitivities is empty"),
        ([1.0], [1, 2], 1, "weights has 2 entries"),
        ([1.0, -1.0], [1, 2], 1, r"sensitivities\[1\]"),
        ([math.nan], [1], 1, r"sensitivities\[0\]"),
        ([1.0], [0], 1, r"weights\[0\]"),
        ([1.0], [math.inf], 1, r"weights\[0\]"),
        ([1.0], [1], -1, "budget_bits"),
        ([1.0], [1], math.nan, "budget_bits"),
    ],
)
def test_bad_input_is_named(a, m, budget, name):
    with pytest.raises(ValueError, match=name):
        reverse_water_filling(a, m, budget)
