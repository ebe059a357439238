"""Error feedback against its definition in dense float64 algebra, and against plain rounding."""

import pytest
import torch
import torch.nn.functional as F

from qpalette.calibration.feedback import DAMPING, LOUD, Feedback, encode_with_feedback, factorize, fit_row_scales
from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles, to_tiles
from qpalette.core.errors import HessianError

NUQ = parse_spec("nuq-2")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(size: int, rank: int | None = None, seed: int = 1) -> torch.Tensor:
    """Second moments of inputs whose directions differ in energy by four orders of magnitude."""
    basis = torch.linalg.qr(gaussian(size, size, seed=seed).double()).Q
    energies = torch.logspace(0, -4, size, dtype=torch.float64)
    energies[size if rank is None else rank :] = 0
    return (basis * energies) @ basis.T


def plain(source: torch.Tensor, quantizer=NUQ) -> tuple[torch.Tensor, torch.Tensor]:
    tiles = to_tiles(source)
    codes = quantizer.encode(tiles.flatten(0, 1))
    return codes.reshape(*tiles.shape[:2], -1), from_tiles(quantizer.decode(codes).reshape(tiles.shape), *source.shape)


def with_feedback(source: torch.Tensor, hessian, quantizer=NUQ, **options) -> tuple[torch.Tensor, torch.Tensor]:
    feedback = hessian if isinstance(hessian, Feedback) else factorize(hessian, **options)
    codes, decoded = encode_with_feedback(source[None], feedback.upper[None], quantizer.encode, quantizer.decode)
    return codes[0], decoded[0]


def proxy(source: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (source - decoded).double()
    return float(((error @ hessian) * error).sum())


def slow_feedback(source: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Block k is moved to where, given the errors before it, the proxy is least over all later columns: Schur's way."""
    size = len(hessian)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    decoded = torch.zeros_like(source)
    for start in range(0, size, 16):
        stop = min(start + 16, size)
        errors = (source - decoded)[:, :start].double()
        # The later columns will follow as they like best: what is left of H is the leading block of its inverse.
        leading = torch.linalg.inv(torch.linalg.inv(damped)[:stop, :stop])
        shift = errors @ leading[:start, start:] @ torch.linalg.inv(leading[start:, start:])
        block = (source[:, start:stop].double() + shift).float()
        decoded[:, start:stop] = plain(block)[1]
    return decoded


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (20, 72), (32, 33)])
def test_equals_the_slow_definition(rows, columns):
    source, hessian = gaussian(rows, columns), correlated(columns)
    codes, decoded = with_feedback(source, hessian)
    assert torch.equal(decoded, slow_feedback(source, hessian, DAMPING))
    assert codes.shape == (-(-rows // 16), -(-columns // 16), NUQ.words_per_tile)
    tiles = NUQ.decode(codes.flatten(0, 1)).reshape(*codes.shape[:2], 256)
    assert torch.equal(from_tiles(tiles, rows, columns), decoded)


@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_without_correlations_it_is_plain_rounding(columns, scale):
    source = gaussian(32, columns)
    hessian = scale * torch.diag(torch.rand(columns, generator=torch.Generator().manual_seed(3)) + 0.1)
    for found, expected in zip(with_feedback(source, hessian), plain(source), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", ["nuq-2", "nuq-4", "tcq-2-L12"])
def test_the_proxy_error_falls(spec):
    quantizer, source, hessian = parse_spec(spec), gaussian(32, 96), correlated(96)
    _, decoded = with_feedback(source, hessian, quantizer)
    assert proxy(source, decoded, hessian) < 0.6 * proxy(source, plain(source, quantizer)[1], hessian)


def test_the_proxy_is_the_plain_error_weighed_by_d():
    """tr(E H E^T) = tr(R D R^T), R the plain rounding errors: QuIP, theorem 1."""
    source, hessian = gaussian(48, 64), correlated(64)
    feedback = factorize(hessian)
    _, decoded = with_feedback(source, feedback)
    unit = torch.eye(64, dtype=torch.float64) + feedback.upper
    inverse = torch.linalg.inv(unit)
    damped = hessian / hessian.diagonal().mean() + DAMPING * torch.eye(64, dtype=torch.float64)
    weights = inverse @ damped @ inverse.T
    blocks = weights.reshape(4, 16, 4, 16).permute(0, 2, 1, 3)
    assert all(blocks[i, j].abs().max() < 1e-9 for i in range(4) for j in range(4) if i != j)
    rounding = (source - decoded).double() @ unit
    assert float(((rounding @ weights) * rounding).sum()) == pytest.approx(proxy(source, decoded, damped))


def test_stacked_rows_and_a_shared_factor_change_nothing():
    members, hessian = [gaussian(32, 80, seed=5), gaussian(16, 80, seed=6)], correlated(80)
    feedback = factorize(hessian)
    stacked, _ = with_feedback(torch.cat(members), feedback)
    one_by_one = [with_feedback(member, hessian)[0] for member in members]
    assert torch.equal(stacked, torch.cat(one_by_one))


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_fewer_tokens_than_inputs(rank):
    source, hessian = gaussian(32, 64), correlated(64, rank)
    _, decoded = with_feedback(source, hessian)
    assert proxy(source, decoded, hessian) < proxy(source, plain(source)[1], hessian)


def test_dead_inputs_are_rounded_as_if_alone():
    source, hessian = gaussian(16, 48), correlated(48)
    hessian[:, 20:36] = hessian[20:36] = 0
    _, decoded = with_feedback(source, hessian)
    assert decoded.isfinite().all()
    expected = plain(source[:, 20:36].contiguous())[1]
    assert torch.equal(from_tiles(to_tiles(decoded[:, 20:36]), 16, 16), expected)


def test_one_input_may_outweigh_all_others():
    source, hessian = gaussian(16, 64), correlated(64)
    hessian[7, 7] += 1e8
    _, decoded = with_feedback(source, hessian)
    assert decoded.isfinite().all()
    assert proxy(source, decoded, hessian) <= 1.001 * proxy(source, plain(source)[1], hessian)


def loud_tokens(size: int, count: int, energy: float) -> torch.Tensor:
    """What `count` tokens add to second moments of trace 1: `energy` in all, in directions of their own."""
    directions = torch.linalg.qr(gaussian(size, count, seed=9).double()).Q
    return energy / count * directions @ directions.T


def damping_of(hessian: torch.Tensor) -> float:
    """What `factorize` adds to the diagonal, in units of the mean diagonal."""
    return float(factorize(hessian).hessian.diagonal().double().mean()) - 1


@pytest.mark.parametrize("energy", [30, 300])
@pytest.mark.parametrize("count", [1, 4])
def test_loud_tokens_do_not_drown_the_others(count, energy):
    """The gain on all other directions is that of a damping that has never heard of the loud ones."""
    source, quiet = gaussian(64, 256), correlated(256)
    quiet /= quiet.trace()
    both = quiet + loud_tokens(256, count, energy)
    error = proxy(source, with_feedback(source, both)[1], quiet)
    told = both + DAMPING * quiet.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    assert error < 1.05 * proxy(source, with_feedback(source, told, damping=0)[1], quiet)
    if count == 1:  # four directions of 256 leave less room for the errors, whatever the damping
        assert error < 1.1 * proxy(source, with_feedback(source, quiet)[1], quiet)


@pytest.mark.parametrize("energy", [0, 3, 30, 300])
def test_the_damping_is_of_the_clipped_mean(energy):
    hessian = correlated(256) / correlated(256).trace() + loud_tokens(256, 4, energy)
    mean = damping_of(hessian) / DAMPING
    values = torch.linalg.eigvalsh(hessian / hessian.diagonal().mean())
    assert mean == pytest.approx(float(values.clamp(max=LOUD * mean).mean()), rel=1e-3)
    assert mean == pytest.approx(1, rel=1e-3) if energy == 0 else mean < 0.5


def test_the_damping_outweighs_what_float32_lost():
    """One token a million times louder than all others: stored in float32, its rounding alone is indefinite."""
    hessian = (correlated(128) / correlated(128).trace() + loud_tokens(128, 1, 1e6)).float()
    assert torch.linalg.eigvalsh(hessian.double()).min() < 0
    feedback = factorize(hessian)
    assert torch.linalg.eigvalsh(feedback.hessian.double()).min() > 0, "after another rounding, too"


def test_a_float32_hessian_that_rounding_made_indefinite():
    hessian = (1e6 * correlated(64, 3)).float()
    hessian[0, 1] *= 1 + 1e-6
    assert torch.linalg.eigvalsh(hessian.double()).min() < 0
    with_feedback(gaussian(16, 64), hessian)


def _bad(change) -> torch.Tensor:
    hessian = correlated(32)
    change(hessian)
    return hessian


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (_bad(lambda h: h[3, 3].fill_(float("nan"))), "NaN or infinity"),
        (_bad(lambda h: h[3, 4].fill_(float("inf"))), "NaN or infinity"),
        (_bad(lambda h: h[3, 4].add_(0.5)), "not symmetric"),
        (_bad(lambda h: h[3, 3].fill_(-1.0)), "negative diagonal"),
        (_bad(lambda h: h.zero_()), "is zero"),
        (_bad(lambda h: h.sub_(0.3 * torch.eye(32)).fill_diagonal_(0.01)), "larger damping"),
        (torch.ones(32, 16), "must be square"),
    ],
)
def test_hessians_that_cannot_be_used_are_named(hessian, message):
    with pytest.raises(HessianError, match=message) as caught:
        factorize(hessian, name="layers.3.qkv")
    assert "layers.3.qkv" in str(caught.value)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_a_damping_that_means_nothing(damping):
    with pytest.raises(HessianError, match="damping"):
        factorize(correlated(16), damping)


def test_more_damping_helps_a_hessian_that_is_not_positive():
    hessian = correlated(32) - 0.05 * correlated(32).diagonal().mean() * torch.eye(32)
    with pytest.raises(HessianError, match="larger damping"):
        factorize(hessian, 0.01)
    factorize(hessian, 0.1)


def test_row_scales_are_least_squares_in_the_norm_of_h():
    source, hessian = gaussian(8, 32).double(), correlated(32)
    decoded = source + 0.3 * gaussian(8, 32, seed=4)
    decoded[2] = 0
    scales = fit_row_scales(source, decoded, hessian)
    root = torch.linalg.cholesky(hessian)
    for row in (0, 1, 3):
        expected = torch.linalg.lstsq((decoded[row] @ root)[:, None], (source[row] @ root)[:, None]).solution
        assert float(scales[row]) == pytest.approx(float(expected), rel=1e-9)
    assert scales[2] == 0


def test_padding_is_an_input_of_its_own():
    feedback = factorize(correlated(20))
    assert feedback.upper.shape == (32, 32)
    assert not feedback.upper[:, 20:].any()
    assert not feedback.upper[20:].any()
    assert torch.equal(feedback.hessian, F.pad(feedback.hessian, (0, 0)))
