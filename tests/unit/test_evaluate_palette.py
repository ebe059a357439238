"""Measurements on a Gaussian source agree with theory."""

from __future__ import annotations

from fractions import Fraction
from statistics import NormalDist

import pytest
import torch

from qpalette.codes import parse_spec
from qpalette.core.errors import InputError
from qpalette.evaluate import measure, palette
from qpalette.evaluate.distortion import estimate_distortion, planted_tiles
from qpalette.theory import lloyd_max


def test_a_scalar_quantizer_measures_as_theory_says():
    result = measure(parse_spec("nuq-4"), weights=200_000)
    assert result.distortion == pytest.approx(lloyd_max(16).distortion, rel=0.02)
    assert result.gap == pytest.approx(result.distortion * 2**8)
    assert (result.spec, result.rate, result.claimed_distortion) == ("nuq-4", Fraction(4), lloyd_max(16).distortion)
    assert result.gap_db == pytest.approx(6.0206 * result.gap_bits, rel=1e-4)
    assert min(result.encode_weights_per_second, result.decode_weights_per_second) > 0


def test_chunks_do_not_change_the_figures(monkeypatch):
    whole = measure(parse_spec("nuq-3"), weights=16 * 256, seed=5)
    monkeypatch.setattr(palette, "CHUNK_TILES", 16)  # torch draws 16 values at a time: the source stays the same
    chunked = measure(parse_spec("nuq-3"), weights=16 * 256, seed=5)
    assert chunked.distortion == whole.distortion
    assert measure(parse_spec("nuq-3"), weights=16 * 256, seed=6).distortion != whole.distortion


def test_weights_are_rounded_up_to_tiles():
    assert measure(parse_spec("nuq-2"), weights=257).weights == 512
    with pytest.raises(InputError, match="at least 1, got 0"):
        measure(parse_spec("nuq-2"), weights=0)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    measure(parse_spec("nuq-2"), weights=256)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["nuq-2", "nuq-5", "nuq-8"])
def test_distortions_are_estimated_as_closely_as_they_say(name):
    """Of many estimates, squares of the errors in standard errors have mean 1.
    Their sum is chi-square; 16 degrees of freedom stay within 3.9 and 40 but for one time in a thousand."""
    exact = lloyd_max(1 << int(name[4:])).distortion
    found = [estimate_distortion(parse_spec(name), 0.02, seed=seed) for seed in range(16)]
    assert 3.9 < sum(((one.value / exact - 1) / one.relative_error) ** 2 for one in found) < 40


def test_planted_tiles_weigh_what_makes_them_normal():
    """Moments and a tail that plain samples of this number would not see, all within five standard errors."""
    tiles, weight = planted_tiles(8192, torch.Generator().manual_seed(0))
    for values, expected in (
        (torch.ones_like(tiles), 1),
        (tiles, 0),
        (tiles.square(), 1),
        (tiles**4, 3),
        ((tiles.abs() > 5).float(), 2 * NormalDist().cdf(-5)),
    ):
        each = weight * values.double().mean(1)
        assert abs(float(each.mean()) - expected) < 5 * float(each.std()) / len(each) ** 0.5
    assert float(each.std()) / len(each) ** 0.5 < 0.1 * expected, "one weight in two million, to 10 %"
