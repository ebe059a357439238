"""What keys are coded after: each transform does what its formula says, and each is better than the one before it."""

import pytest
import torch

from qpalette.core.errors import InputError, SpecError
from qpalette.kvcache import (
    CachePlan,
    KeyMoments,
    VectorFormat,
    balanced,
    key_transforms,
    mean_removed,
    parse_code,
    read_moments,
    shaped,
    white,
    write_moments,
)
from qpalette.kvcache.shaping import BLOCK, equal_rotation, unit_lower
from qpalette.kvcache.transform import FLOOR

HEADS, DIM = 2, 32


def moment(seed: int, spread: float = 2.0) -> torch.Tensor:
    """[heads, dim, dim], eigenvalues over e^(2 spread)."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=generator))[0]
    return (basis * torch.linspace(-spread, spread, DIM, dtype=torch.float64).exp()) @ basis.mT


def keys_of(covariance: torch.Tensor, mean: torch.Tensor, count: int) -> torch.Tensor:
    root = torch.linalg.cholesky(covariance).float()
    normal = torch.randn(1, HEADS, count, DIM, generator=torch.Generator().manual_seed(9))
    return normal @ root.mT + mean[:, None]


@pytest.fixture(scope="module")
def known() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(4))
    return mean, moment(1), moment(2)


def test_balanced_is_the_transport_from_covariance_to_metric(known):
    mean, covariance, metric = known
    found = balanced(mean, covariance, metric)
    square = (found.matrix.mT @ found.matrix).double()
    product = square @ covariance @ square
    scale = (product.diagonal(dim1=1, dim2=2).sum(-1) / metric.diagonal(dim1=1, dim2=2).sum(-1))[:, None, None]
    # the floor under both moments moves each by FLOOR of its mean eigenvalue
    assert ((product / scale - metric).norm(dim=(1, 2)) < 50 * FLOOR * metric.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("make", ["white", "mean", "balanced", "shaped"])
def test_what_is_transformed_comes_back(known, make):
    mean, covariance, metric = known
    transform = {
        "white": lambda: white(DIM),
        "mean": lambda: mean_removed(mean, covariance),
        "balanced": lambda: balanced(mean, covariance, metric),
        "shaped": lambda: shaped(mean, covariance, metric, 0.03),
    }[make]()
    keys = keys_of(covariance, mean, 64)
    torch.testing.assert_close(transform.undo(transform.apply(keys)), keys, rtol=1e-3, atol=1e-3)
    if make != "white":
        coordinates = transform.apply(keys_of(covariance, mean, 4096))
        assert coordinates.square().mean((0, 2, 3)).tolist() == pytest.approx([1.0] * HEADS, rel=0.1)


def test_each_transform_costs_less_than_the_one_before(known):
    """By the theory's own measure: the error's cost by the metric, with the real code."""
    mean, covariance, metric = known
    keys, code = keys_of(covariance, 3 * mean, 4096), parse_code("vq-3")
    mean = 3 * mean
    costs = []
    for transform in (
        white(DIM),
        mean_removed(mean, covariance),
        balanced(mean, covariance, metric),
        shaped(mean, covariance, metric, code.distortion),
    ):
        format, points = VectorFormat(code, DIM, unbiased=False), code.points(keys.device)
        stored = format.encode(transform.apply(keys), points, transform.shaping)
        error = (transform.undo(format.decode(*stored, points)) - keys).double()
        costs.append(float(((error @ metric) * error).sum(-1).mean()))
    assert costs == sorted(costs, reverse=True)
    assert costs[3] < 0.75 * costs[2] < 0.5 * costs[0]


def test_the_rotation_makes_all_steps_cost_alike():
    cost = moment(5, spread=3.0)
    rotation = equal_rotation(cost, BLOCK)
    eye = torch.eye(DIM, dtype=torch.float64)
    torch.testing.assert_close(rotation.mT @ rotation, eye.expand(HEADS, DIM, DIM), rtol=0, atol=1e-9)
    turned = rotation.mT @ cost @ rotation
    lower = unit_lower(turned)
    middle = torch.linalg.inv(lower).mT @ turned @ torch.linalg.inv(lower)
    diagonal = middle.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(middle, torch.diag_embed(diagonal), rtol=0, atol=1e-8)
    level = torch.linalg.eigvalsh(cost).log().mean(-1).exp()
    least = torch.linalg.eigvalsh(cost).sqrt().mean(-1).square()  # what `balanced` reaches
    assert (diagonal.mean(-1) < 1.1 * level).all()  # 1.0 is the bound: their product is the determinant
    assert (1.5 * level < least).all()
    torch.testing.assert_close(diagonal[:, -BLOCK:], level[:, None].expand(HEADS, BLOCK), rtol=1e-6, atol=0)
    blocks = lower.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    torch.testing.assert_close(blocks, torch.eye(BLOCK, dtype=torch.float64).expand_as(blocks), rtol=0, atol=1e-6)


def test_layers_are_made_together_as_alone(known):
    mean, covariance, metric = (part.float() for part in known)
    one = KeyMoments(mean, covariance, metric)
    other = KeyMoments(2 * mean, 3 * covariance, metric)
    plan = CachePlan(("vq-3", "vq-2", "vq-3"), ("vq-2",))
    together = key_transforms(plan, [one, one, other])
    assert [transform.matrix.shape[0] for transform in together] == [HEADS] * 3
    for layer, (moments, code) in enumerate(((one, "vq-3"), (one, "vq-2"), (other, "vq-3"))):
        found, keys = together[layer], keys_of(moments.covariance.double(), moments.mean, 32)
        assert torch.equal(found.mean, moments.mean)
        torch.testing.assert_close(found.undo(found.apply(keys)), keys, rtol=1e-3, atol=1e-3)
        alone = shaped(moments.mean, moments.covariance, moments.queries, parse_code(code).distortion)
        assert torch.allclose(found.gain, alone.gain, rtol=0.1)


def test_heads_that_are_no_blocks_are_refused():
    eye = torch.eye(12).expand(1, 12, 12)
    with pytest.raises(SpecError, match="balanced:"):
        shaped(torch.zeros(1, 12), eye, eye, 0.1)


def test_a_head_that_is_never_anything_but_zero_can_be_coded():
    zeros = torch.zeros(1, 16, 16)
    for transform in (balanced(torch.zeros(1, 16), zeros, zeros), shaped(torch.zeros(1, 16), zeros, zeros, 0.03)):
        assert transform.undo(transform.apply(torch.zeros(1, 1, 2, 16))).abs().max() == 0


def test_moments_come_back_from_their_file(tmp_path, known):
    mean, covariance, metric = (part.float() for part in known)
    file = tmp_path / "moments.safetensors"
    write_moments(file, [KeyMoments(mean, covariance, metric)], {"text": "none"})
    (found,) = read_moments(file, 1)
    assert torch.equal(found.queries, metric)
    with pytest.raises(InputError, match="2 layers"):
        read_moments(file, 2)
    write_moments(file, [KeyMoments(mean, covariance[:, :, :3], metric)], {})
    with pytest.raises(InputError, match="no moments"):
        read_moments(file, 1)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        read_moments(file, 1)
