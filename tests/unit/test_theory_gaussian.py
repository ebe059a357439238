from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpalette.theory import distortion_bound, gap, gap_bits, gap_db, rate_bound


@pytest.mark.parametrize(("rate", "distortion"), [(0, 1.0), (1, 0.25), (Fraction(5, 2), 0.03125), (4.0, 1 / 256)])
def test_distortion_bound(rate, distortion):
    assert distortion_bound(rate) == distortion


@given(st.floats(0, 60))
def test_the_bounds_are_inverses(rate):
    assert rate_bound(distortion_bound(rate)) == pytest.approx(rate, abs=1e-12)


def test_no_rate_is_needed_for_a_distortion_above_the_variance():
    assert rate_bound(1.0) == 0.0
    assert rate_bound(7.0) == 0.0


@given(st.floats(0, 16), st.floats(1e-6, 10))
def test_gaps_agree_with_each_other(rate, factor):
    distortion = factor * distortion_bound(rate)
    assert gap(distortion, rate) == pytest.approx(factor)
    assert gap_bits(distortion, rate) == pytest.approx(math.log2(factor) / 2, abs=1e-9)
    assert gap_db(distortion, rate) == pytest.approx(10 * math.log10(factor), abs=1e-9)


@pytest.mark.parametrize("rate", [-0.1, math.inf, math.nan, Fraction(-1, 8)])
def test_bad_rates_are_named(rate):
    with pytest.raises(ValueError, match="rate must be"):
        distortion_bound(rate)


@pytest.mark.parametrize("distortion", [0.0, -1.0, math.inf, math.nan])
def test_bad_distortions_are_named(distortion):
    with pytest.raises(ValueError, match="distortion must be"):
        rate_bound(distortion)
    with pytest.raises(ValueError, match="distortion must be"):
        gap(distortion, 2)
