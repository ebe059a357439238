from __future__ import annotations

import itertools
import math

import pytest
from scipy import integrate, stats

from qpalette.theory import distortion_bound, lloyd_max
from qpalette.theory.lloyd_max import MAX_LEVELS


def cells(codebook):
    borders = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(codebook)), math.inf]
    return list(zip(codebook, borders, borders[1:], strict=False))


# Max 1960, table I. Its 0.009497 for 16 levels is off in the fourth digit: the integral below confirms 0.009501.
@pytest.mark.parametrize(
    ("levels", "distortion", "outermost"),
    [
        (1, 1.0, 0.0),
        (2, 0.3634, 0.798),
        (3, 0.1902, 1.224),
        (4, 0.1175, 1.510),
        (8, 0.03454, 2.152),
        (16, 0.009497, 2.733),
    ],
)
def test_published_values(levels, distortion, outermost):
    quantizer = lloyd_max(levels)
    assert quantizer.distortion == pytest.approx(distortion, rel=1e-3)
    assert quantizer.codebook[-1] == pytest.approx(outermost, abs=1e-3)


def test_256_levels_approach_panter_dite():
    asymptote = math.sqrt(3) * math.pi / 2 / 256**2
    assert 0.98 * asymptote < lloyd_max(256).distortion < asymptote


@pytest.mark.parametrize("levels", [2, 3, 4, 7, 16])
def test_distortion_is_the_integral(levels):
    quantizer = lloyd_max(levels)
    error = sum(
        integrate.quad(lambda x, c=c: (x - c) ** 2 * stats.norm.pdf(x), low, high, epsabs=1e-13)[0]
        for c, low, high in cells(quantizer.codebook)
    )
    assert quantizer.distortion == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("levels", [2, 3, 5, 16, 31, 64, 255, 256])
def test_levels_are_the_centroids_of_their_cells(levels):
    for level, low, high in cells(lloyd_max(levels).codebook):
        if level >= 0:  # the survival function is the accurate one on this side
            mass = stats.norm.sf(low) - stats.norm.sf(high)
            assert level == pytest.approx((stats.norm.pdf(low) - stats.norm.pdf(high)) / mass, abs=1e-12)


@pytest.mark.parametrize("levels", [*range(1, 70), 127, 256, 500, MAX_LEVELS])
def test_symmetric_ascending_and_above_the_bound(levels):
    quantizer = lloyd_max(levels)
    codebook = quantizer.codebook
    assert len(codebook) == levels
    assert all(a < b for a, b in itertools.pairwise(codebook))
    assert tuple(-c for c in reversed(codebook)) == codebook
    assert quantizer.distortion >= distortion_bound(math.log2(levels))


@pytest.mark.parametrize("levels", [0, -3, MAX_LEVELS + 1])
def test_bad_levels_are_named(levels):
    with pytest.raises(ValueError, match="levels must be"):
        lloyd_max(levels)
