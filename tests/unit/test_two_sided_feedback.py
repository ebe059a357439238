"""Rounding by Hessians of both sides, against full-matrix loops and the theory's sum over tiles."""

import pytest
import torch
from test_calibration_feedback import correlated, gaussian, plain, with_feedback

from qpalette.calibration.feedback import encode_with_feedback, factorize, fit_row_scales, stack_factors
from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles

NUQ = parse_spec("nuq-2")
SHAPES = [(16, 16), (48, 32), (32, 80), (40, 72), (33, 17), (5, 100)]


def two_sided(sources, inputs, outputs, quantizer=NUQ):
    """Matrices [B, M, K], H_I of each, and the blocks of H_O of each."""
    return encode_with_feedback(
        sources,
        torch.stack([factorize(h).upper for h in inputs]),
        quantizer.encode,
        quantizer.decode,
        torch.stack([stack_factors([factorize(block) for block in blocks]) for blocks in outputs]),
    )


def loss(error: torch.Tensor, inputs: torch.Tensor, outputs: list[torch.Tensor]) -> float:
    error = error.double()
    weighed = torch.block_diag(*outputs) @ error @ inputs
    return float((weighed * error).sum())


def pair(rows: int, columns: int, blocks: int = 1, seed: int = 11) -> tuple[torch.Tensor, list[torch.Tensor]]:
    height = 16 * -(-rows // (16 * blocks))  # of all but the last, which may have fewer
    heights = [min(height, rows - start) for start in range(0, rows, height)]
    return correlated(columns, seed=seed), [correlated(h, seed=seed + 1 + n) for n, h in enumerate(heights)]


def slow(source: torch.Tensor, inputs: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Tile after tile, row by row: to the nearest of W + ((I + V)^T E (I + U)), with E the errors so far."""
    upper = factorize(inputs).upper
    lower = torch.block_diag(*(factorize(block).upper for block in outputs))
    rows, columns = source.shape
    padded = torch.zeros(len(lower), len(upper))
    padded[:rows, :columns] = source
    errors = torch.zeros_like(padded, dtype=torch.float64)
    decoded = torch.zeros_like(padded)
    for top in range(0, len(lower), 16):
        for left in range(0, len(upper), 16):
            tile = slice(top, top + 16), slice(left, left + 16)
            fed = (torch.eye(len(lower)) + lower).T @ errors @ (torch.eye(len(upper)) + upper)
            decoded[tile] = plain((padded[tile].double() + fed[tile]).float())[1]
            errors[tile] = padded[tile].double() - decoded[tile].double()
    return decoded[:rows, :columns]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_equals_the_slow_definition(rows, columns):
    source, (inputs, outputs) = gaussian(rows, columns), pair(rows, columns)
    codes, decoded = two_sided(source[None], [inputs], [outputs])
    assert torch.equal(decoded[0], slow(source, inputs, outputs))
    tiles = NUQ.decode(codes[0].flatten(0, 1)).reshape(*codes.shape[1:3], 256)
    assert torch.equal(from_tiles(tiles, rows, columns), decoded[0])


@pytest.mark.parametrize(("rows", "blocks"), [(64, 2), (96, 3), (90, 2), (100, 3)])
def test_blocks_of_rows_are_rounded_as_if_alone(rows, blocks):
    source, (inputs, outputs) = gaussian(rows, 48), pair(rows, 48, blocks)
    _, together = two_sided(source[None], [inputs], [outputs])
    parts = source.split([len(block) for block in outputs])
    for part, block, found in zip(parts, outputs, together[0].split([len(b) for b in outputs]), strict=True):
        _, alone = two_sided(part[None], [inputs], [[block]])
        assert torch.equal(found, alone[0])


def test_matrices_of_one_shape_are_rounded_as_if_alone():
    sources = gaussian(3, 40, 56)
    pairs = [pair(40, 56, seed=seed) for seed in (20, 30, 40)]
    codes, decoded = two_sided(sources, [p[0] for p in pairs], [p[1] for p in pairs])
    for n, (inputs, outputs) in enumerate(pairs):
        alone, values = two_sided(sources[n : n + 1], [inputs], [outputs])
        assert torch.equal(codes[n], alone[0])
        assert torch.equal(decoded[n], values[0])


@pytest.mark.parametrize("spec", ["nuq-2", "nuq-4", "tcq-2-L12"])
@pytest.mark.parametrize(("rows", "columns"), [(96, 96), (72, 130)])
def test_the_loss_falls_against_one_side_and_against_plain_rounding(spec, rows, columns):
    quantizer, source, (inputs, outputs) = parse_spec(spec), gaussian(rows, columns), pair(rows, columns)
    both = source - two_sided(source[None], [inputs], [outputs], quantizer)[1][0]
    one = source - with_feedback(source, inputs, quantizer)[1]
    none = source - plain(source, quantizer)[1]
    losses = [loss(error, inputs, outputs) for error in (both, one, none)]
    assert losses[0] < 0.7 * losses[1]
    assert losses[1] < 0.7 * losses[2]


def test_without_correlations_it_is_plain_rounding():
    source = gaussian(40, 50)
    codes, decoded = two_sided(source[None], [torch.eye(50)], [[torch.eye(40)]])
    for found, expected in zip((codes[0], decoded[0]), plain(source), strict=True):
        assert torch.equal(found, expected)


def test_the_loss_is_the_plain_error_weighed_tile_by_tile():
    """tr(H_O E H_I E^T) = sum over tiles of tr(C_i R_ij D_j R_ij^T), for R = (I + V)^T E (I + U), which is plain."""
    rows, columns = 48, 64
    source, (inputs, outputs) = gaussian(rows, columns), pair(rows, columns)
    one, other = factorize(inputs), factorize(outputs[0])
    _, decoded = two_sided(source[None], [inputs], [outputs])
    error = (source - decoded[0]).double()
    upper, lower = (torch.eye(len(f.upper)) + f.upper for f in (one, other))
    rounding = lower.T @ error @ upper
    d, c = (torch.linalg.inv(f) @ h.hessian.double() @ torch.linalg.inv(f).T for f, h in ((upper, one), (lower, other)))
    total = 0.0
    for top in range(0, rows, 16):
        for left in range(0, columns, 16):
            i, j = slice(top, top + 16), slice(left, left + 16)
            total += float((c[i, i] @ rounding[i, j] @ d[j, j] * rounding[i, j]).sum())
    damped = loss(error, one.hessian.double(), [other.hessian.double()])
    assert total == pytest.approx(damped, rel=1e-6)
    target = source.double() + rounding - error
    assert float((target - decoded[0]).abs().max()) < 8, "R is what plain rounding of the target leaves"
    assert torch.equal(plain(target[:16, :16].float())[1], decoded[0][:16, :16])


@pytest.mark.parametrize("blocks", [1, 2])
def test_row_scales_are_least_in_the_norm_of_both_sides(blocks):
    source, (inputs, outputs) = gaussian(64, 48).double(), pair(64, 48, blocks)
    decoded = source + 0.3 * gaussian(64, 48, seed=4)
    scales = fit_row_scales(source, decoded, inputs, outputs)
    least = loss(source - scales * decoded, inputs, outputs)
    for row in range(0, 64, 7):
        for step in (-1e-4, 1e-4):
            moved = scales.clone()
            moved[row] += step
            assert loss(source - moved * decoded, inputs, outputs) > least
    alone = fit_row_scales(source, decoded, inputs)
    assert loss(source - alone * decoded, inputs, outputs) > least


def test_a_row_that_is_decoded_to_zeros_has_no_scale():
    source, (inputs, outputs) = gaussian(32, 32).double(), pair(32, 32)
    decoded = source.clone()
    decoded[5] = 0
    scales = fit_row_scales(source, decoded, inputs, outputs)
    assert scales[5] == 0
    assert scales.isfinite().all()
