"""The diagonal that makes columns alike."""

import pytest
import torch

from qpalette.calibration.equalize import FAINTEST, equalize


def matrices(count: int = 2, rows: int = 96, columns: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    rough = [torch.logspace(-2, 0, rows)[:, None] for _ in range(count)]
    return [r * torch.randn(rows, columns, generator=generator) * scale for r in rough]


def column_norms(weights, scale) -> torch.Tensor:
    rows = torch.cat(weights).double() / scale
    return (rows / rows.square().mean(1, keepdim=True).sqrt()).square().mean(0).sqrt()


def spread(values: torch.Tensor) -> float:
    return float(values.log().std())


@pytest.mark.parametrize("count", [1, 3])
def test_columns_of_unit_rows_have_one_norm(count):
    weights = matrices(count)
    scale = equalize(weights)
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-9)
    assert spread(column_norms(weights, scale)) < 0.01
    assert spread(column_norms(weights, torch.ones(64))) > 0.5


def test_siblings_count_by_their_rows():
    one, other = matrices(2)
    assert torch.allclose(equalize([one, other]), equalize([torch.cat([one, other])]), rtol=1e-9)


def test_the_determinant_is_what_is_won():
    """|W S^-1|^2 (det S)^(2/K), rows of unit norm, falls: the loss that full feedback leaves."""
    (weight,) = matrices(1)
    scale = equalize([weight])

    def bound(s: torch.Tensor) -> float:
        rows = weight.double() / s
        return float(rows.square().mean(1).log().mean() + 2 * s.log().mean())

    assert bound(scale) < bound(torch.ones(64, dtype=torch.float64)) - 0.1


def test_columns_and_rows_of_zeros_are_finite():
    (weight,) = matrices(1)
    weight[:, 3] = 0
    weight[7] = 0
    scale = equalize([weight])
    assert scale.isfinite().all()
    assert FAINTEST <= float(scale.min()) <= float(scale.max()) <= 2 / FAINTEST
    assert equalize([torch.zeros(16, 8)]).isfinite().all()
