"""The error that calibrated rounding leaves: its shape against real rounding, its cost against exact sums."""

from __future__ import annotations

import pytest
import torch
from test_moments import DOWN, GATE_UP, GROUPS, QKV, VOCABULARY, backward, calibration
from test_moments import model as model  # a fixture

from qpalette.calibration import collect_hessians, hessians
from qpalette.calibration.feedback import encode_with_feedback
from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.rounding import ROUNDING, Rounding, Shaping, prepare
from qpalette.calibration.sensitivity import Divergence
from qpalette.calibration.shaped import BAND_RATE, CURVE_RATES, ShapedNoise, curvatures, measured_sensitivities
from qpalette.codes import parse_spec
from qpalette.core.resume import PartialFigures
from qpalette.rotate import random_signs, rotation_for
from qpalette.theory import distortion_bound

NUQ = parse_spec("nuq-2")


def windows(count: int, seed: int) -> list[torch.Tensor]:
    return list(torch.randint(0, VOCABULARY, (count, 20), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module", params=[1, 2])
def store(model, tmp_path_factory, request) -> HessianStore:
    found = HessianStore(tmp_path_factory.mktemp("store"), calibration(request.param))
    collect_hessians(model, windows(12, 1), GROUPS, found)
    return found


@pytest.fixture
def noise(model, store) -> ShapedNoise:
    return ShapedNoise(model, GROUPS, store, ROUNDING, "full", 0)


def partial(tmp_path, name: str = "partial") -> PartialFigures:
    return PartialFigures(tmp_path / name, {})


def shaping(rows: int, columns: int, blocks: int, monkeypatch) -> Shaping:
    generator = torch.Generator().manual_seed(5)

    def moments(size: int) -> torch.Tensor:
        x = torch.randn(3 * size, size, generator=generator) * torch.logspace(0, -1, size)
        return x.T @ x

    monkeypatch.setattr(hessians, "BLOCK_TILES", -(-rows // 16 // blocks))
    weight, rotation = torch.randn(rows, columns, generator=generator), rotation_for(columns, "full")
    diagonal = random_signs(columns, 0, "x") * torch.logspace(-0.5, 0.5, columns)
    outputs = [moments(rows // blocks) for _ in range(blocks)]
    return prepare("x", weight, rotation, diagonal, moments(columns), outputs, ROUNDING).shaping


@pytest.mark.parametrize(("rows", "columns", "blocks"), [(32, 48, 1), (64, 36, 2), (64, 36, 0)])
def test_the_adjoint_is_the_adjoint(rows, columns, blocks, monkeypatch):
    """tr(G^T E(R)) = tr(A(G)^T R)."""
    shape = shaping(rows, columns, max(1, blocks), monkeypatch)
    if blocks == 0:
        shape = Shaping(shape.upper, (), shape.rms, shape.diagonal, shape.rotation)
    noise, gradient = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(6))
    left = float((gradient * shape.apply(noise)).sum())
    assert left == pytest.approx(float((shape.adjoint(gradient) * noise).sum()), rel=1e-4)


def test_what_rounding_leaves_is_the_shape_of_its_plain_errors(model, store):
    """E of a weight that was really rounded is the map of R = (I + V)^T E (I + U) in unit rows."""
    (linear,) = DOWN.linears
    weight = model.get_submodule(linear.name).weight.detach()
    rotation, diagonal = rotation_for(48, "full"), random_signs(48, 0, "down").float()
    outputs = store.read_outputs(DOWN, linear.name)
    found = prepare(linear.name, weight, rotation, diagonal, store.read(DOWN), outputs, ROUNDING)
    left = found.left
    _, decoded = encode_with_feedback(
        *(found.unit[None], found.inputs.upper[None], NUQ.encode, NUQ.decode),
        *([] if left is None else [left[None]]),
    )
    error = (found.unit - decoded[0]).double()
    rounding = error @ (torch.eye(48) + found.inputs.upper)
    if left is not None:
        rounding = (torch.eye(32) + left[0]).T @ rounding
    shaped = found.shaping.apply(rounding.float())
    torch.testing.assert_close(shaped, found.restore(error.float()), rtol=1e-4, atol=1e-5)
    assert 0.05 < float(rounding.square().mean()) < 0.2, "of the size of a 2-bit code's errors"


def test_curvatures_are_the_mean_loss_of_drawn_noise_to_second_order(model, noise, tmp_path):
    """1/2 E[tr(G^T E)^2] over many draws of R, against the closed form."""
    held_out = windows(2, 3)
    found = curvatures(model, held_out, noise, memory_budget_bytes=1 << 30, seed=7, partial=partial(tmp_path))
    generator = torch.Generator().manual_seed(8)
    for group in (QKV, DOWN):
        for name, shape in noise.shapings(group):
            total, draws = 0.0, 400
            errors = [
                shape.apply(torch.randn(noise.weights[name].values.shape, generator=generator)) for _ in range(draws)
            ]
            for number, window in enumerate(held_out):
                weight = model.get_submodule(name).weight
                gradients: list[torch.Tensor] = []
                handle = weight.register_hook(lambda g, keep=gradients: keep.append(g.clone()))
                backward(model, window, 7 + number)
                handle.remove()
                total += sum(float((gradients[0] * error).sum()) ** 2 for error in errors) / draws
            expected = total / 2 / sum(len(window) - 1 for window in held_out)
            # A mean of squares of normal variables: relative deviation sqrt(2 / draws), four of them.
            assert found[name] == pytest.approx(expected, rel=4 * (2 / draws) ** 0.5)


def drawn_of(noise: ShapedNoise) -> dict[str, torch.Tensor]:
    return dict(item for group in GROUPS for item in noise.draw(group))


def test_what_all_fits_is_prepared_once(model, noise, tmp_path, monkeypatch):
    before = drawn_of(noise)
    curvatures(model, windows(1, 3), noise, memory_budget_bytes=1 << 30, seed=0, partial=partial(tmp_path))
    monkeypatch.setattr("qpalette.calibration.shaped.prepare", lambda *_: pytest.fail("prepared again"))
    after = drawn_of(noise)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_curvatures_do_not_depend_on_the_budget_and_go_on(model, store, tmp_path):
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    options = {"seed": 0, "memory_budget_bytes": 1}
    held_out = windows(2, 3)
    noise, of_whole = (ShapedNoise(model, GROUPS, store, ROUNDING, "full", 0) for _ in range(2))
    whole = curvatures(model, held_out, of_whole, seed=0, memory_budget_bytes=1 << 30, partial=partial(tmp_path, "a"))
    with pytest.raises(Killed):
        curvatures(model, held_out, noise, **options, partial=partial(tmp_path), progress=kill)
    seen: list[int] = []
    again = curvatures(
        model, held_out, noise, **options, partial=partial(tmp_path), progress=lambda done, _: seen.append(done)
    )
    assert seen == [3, 4]
    assert again == pytest.approx(whole, rel=1e-5)


def test_sensitivities_predict_the_kl_of_their_own_noise(model, noise, tmp_path):
    held_out, before = windows(4, 3), {name: weight.values.clone() for name, weight in noise.weights.items()}
    prior = curvatures(model, held_out, noise, memory_budget_bytes=1 << 30, seed=0, partial=partial(tmp_path))
    divergence = Divergence(model, held_out)
    values, curve = measured_sensitivities(divergence, noise, prior, bands=2, partial=partial(tmp_path))
    assert all(torch.equal(weight.values, before[name]) for name, weight in noise.weights.items())
    assert [y for _, y in curve] == sorted(y for _, y in curve)
    assert len(curve) == len(CURVE_RATES)
    drawn = drawn_of(noise)
    (linear,) = DOWN.linears
    size = distortion_bound(BAND_RATE)
    noise.weights[linear.name].values.add_(size**0.5 * drawn[linear.name])
    assert divergence.measure() == pytest.approx(size * values[linear.name], rel=1e-4), "a band of its own"
    noise.weights[linear.name].values.copy_(before[linear.name])


def test_the_measurement_is_resumed(model, noise, tmp_path):
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    prior = {linear.name: 1.0 for group in GROUPS for linear in group.linears}
    divergence = Divergence(model, windows(1, 3))
    whole = measured_sensitivities(divergence, noise, prior, bands=1, partial=partial(tmp_path, "whole"))
    with pytest.raises(Killed):
        measured_sensitivities(divergence, noise, prior, bands=1, partial=partial(tmp_path), progress=kill)
    calls: list[int] = []
    measure, divergence.measure = divergence.measure, lambda *changed: calls.append(1) or measure(*changed)
    again = measured_sensitivities(divergence, noise, prior, bands=1, partial=partial(tmp_path))
    assert again == whole
    assert len(calls) == 7 + len(CURVE_RATES) - 3, "seven kinds"


def test_feedback_makes_noise_cheaper(model, noise, store, tmp_path):
    """On the text it was calibrated on: less second-order loss than white noise of the same distortion of R."""
    text = windows(12, 1)
    options = {"memory_budget_bytes": 1 << 30, "seed": 0}
    shaped = curvatures(model, text, noise, **options, partial=partial(tmp_path))
    unshaped = ShapedNoise(model, GROUPS, store, Rounding(1e6, 1e6, equalize=False), "full", 0)
    white = curvatures(model, text, unshaped, **options, partial=partial(tmp_path, "white"))
    assert sum(shaped.values()) < 0.8 * sum(white.values())
    assert all(shaped[linear.name] < 1.1 * white[linear.name] for linear in GATE_UP.linears)
