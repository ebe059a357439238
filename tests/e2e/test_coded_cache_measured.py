"""What coded caches lose: measurements read codes, keys are calibrated, baselines are measured alike."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from coded_models import coded, llama, logits_step_by_step, small, tokens
from tiny_model import build

from qpalette.calibration.attention_taps import watched
from qpalette.calibration.cache_moments import cost_of_errors, key_moments, spread_offsets, stream_costs
from qpalette.core.errors import InputError
from qpalette.evaluate.cache import evaluate_cache, transforms_for
from qpalette.evaluate.cache_baselines import BASELINES, BaselineCache
from qpalette.kvcache import parse_cache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return llama()


def test_what_is_measured_is_never_the_exact_prompt(model):
    """A prompt in one call reads codes, too: a coarse cache shows, as it does token by token."""
    window = tokens(1, 60)[0]
    coarse = evaluate_cache(model, None, "white:nuq-2,sinks=0", [window])
    fine = evaluate_cache(model, None, "white:nuq-8,sinks=0", [window])
    assert coarse.kl > 0.05 > 5 * fine.kl > 0
    cache = coded(model, "white:nuq-2,sinks=0", own_exact=False)
    mine = logits_step_by_step(model, window[None, :-1], cache)[0].log_softmax(-1)
    with torch.no_grad():
        true = model(window[None, :-1]).logits[0].log_softmax(-1)
    each = (true.exp() * (true - mine)).sum(-1)
    assert coarse.kl == pytest.approx(float(each.mean()), rel=1e-2)
    assert coarse.kl_median == pytest.approx(float(each.sort().values[29]), rel=2e-2)
    assert coarse.kl_median < coarse.kl_999 == pytest.approx(float(each.max()), rel=2e-2)


def test_keys_are_calibrated_over_the_context(model):
    windows = [tokens(1, 32, seed)[0] for seed in range(6)]
    offsets = spread_offsets(256, 32, 6)
    assert min(offsets) == 0
    assert all(0 <= offset <= 224 for offset in offsets)
    assert max(offsets) > 150
    near, far = key_moments(model, windows, 32, 4), key_moments(model, windows, 256, 4)
    assert len(near) == 2
    # Queries and keys turn together: values stay, and so does what a model predicts; the keys' moments do not.
    assert (near[0].covariance - far[0].covariance).norm() > 0.05 * near[0].covariance.norm()
    one, other = (x[0].covariance.diagonal(dim1=1, dim2=2).sum() + x[0].mean.square().sum() for x in (near, far))
    assert float(one) == pytest.approx(float(other), rel=1e-3)
    with pytest.raises(InputError, match="more than 4 tokens"):
        key_moments(model, [tokens(1, 3)[0]], 32, 4)


def test_calibrated_transforms_lose_less(model):
    biased = build("llama-bias", max_position_embeddings=256)
    with torch.no_grad():  # as Qwen2 has them: a mean that softmax does not see
        for layer in biased.model.layers:
            layer.self_attn.k_proj.bias *= 8
    windows = [tokens(1, 64, seed)[0] for seed in range(8)]
    held_out = [tokens(1, 64, seed)[0] for seed in range(20, 23)]
    found = {
        name: evaluate_cache(biased, None, f"{name}:nuq-3/nuq-8", held_out, calibration=windows).kl
        for name in ("shaped", "balanced", "white")
    }
    assert found["balanced"] < found["white"]
    assert found["shaped"] < found["white"]


def test_moments_are_kept_and_read_again(model, tmp_path, monkeypatch):
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path))
    first = transforms_for(model, None, parse_cache("vq-3"), 64)
    files = list((tmp_path / "key_moments").iterdir())
    assert len(files) == 2
    times = [file.stat().st_mtime_ns for file in files]
    again = transforms_for(model, None, parse_cache("vq-3"), 50)
    assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(first, again, strict=True))
    assert [file.stat().st_mtime_ns for file in files] == times


def test_two_that_need_moments_at_once_make_them_once(model, tmp_path, monkeypatch):
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path))
    began, made = threading.Barrier(2), []

    def measured(*given):
        made.append(key_moments(*given))
        return made[-1]

    def asked() -> list:
        began.wait(60)
        return transforms_for(model, None, parse_cache("vq-3"), 32)

    monkeypatch.setattr(import_module("qpalette.evaluate.cache"), "key_moments", measured)
    with ThreadPoolExecutor(2) as pool:
        one, other = [each.result() for each in [pool.submit(asked), pool.submit(asked)]]
    assert len(made) == 1
    assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(one, other, strict=True))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_watched_model_is_as_before(model):
    before, ids = model.config._attn_implementation, tokens(1, 9)
    seen = []
    plain = model(ids).logits
    with watched(model, lambda layer, query, key, value: (seen.append(layer), (key, value))[1]):
        assert torch.equal(model(ids).logits, plain)
    assert seen == [0, 1]
    assert model.config._attn_implementation == before


def test_predicted_is_what_small_errors_cost(model):
    """The sum to second order against the KL that the same errors make, keys and values together."""
    windows = [tokens(1, 48, seed)[0] for seed in range(6)]

    def error(layer, states, place):
        generator = torch.Generator().manual_seed(100 * layer + place)
        return 0.02 * states.std() * torch.randn(states.shape, generator=generator)

    def probe(layer, key, value):
        return cost_of_errors([error(layer, key, 0)]), cost_of_errors([error(layer, value, 1)])

    draws = [stream_costs(model, windows, probe, seed=1000 * seed) for seed in range(8)]
    predicted = sum(float(sum(a.sum() + b.sum() for a, b in costs)) for costs in draws) / len(draws)
    total = 0.0
    with torch.no_grad():
        for window in windows:
            true = model(window[None]).logits[0, :-1].log_softmax(-1)
            with watched(model, lambda i, q, k, v: (k + error(i, k, 0), v + error(i, v, 1))):
                mine = model(window[None]).logits[0, :-1].log_softmax(-1)
            total += float((true.exp() * (true - mine)).sum())
    measured = total / (6 * 47)
    assert predicted == pytest.approx(measured, rel=0.35)  # 282 predictions, 8 draws of labels each
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines_are_measured_alike(name):
    model = small("llama", head_dim=32)
    window = tokens(1, 70)[0]
    plain, sinks = (evaluate_cache(model, None, spec, [window]) for spec in (name, f"{name},sinks=4"))
    assert 0 < plain.kl < 0.2
    assert plain.cache_bits == sinks.cache_bits
    assert sinks.cache_bits_with_exact > plain.cache_bits_with_exact
    cache = BaselineCache(model.config, BASELINES[name], 4)
    with torch.no_grad():
        model(window[None], past_key_values=cache)
        exact = model(window[None]).past_key_values
    assert torch.equal(cache.layers[0].keys[:, :, :4], exact.layers[0].keys[:, :, :4])
    assert not torch.equal(cache.layers[0].keys[:, :, 4:], exact.layers[0].keys[:, :, 4:])


def test_bits_of_baselines_are_all_bits():
    bits = {name: [float(part) for part in baseline.bits(64)] for name, baseline in BASELINES.items()}
    assert bits["q4_0"] == [4.5, 4.5]
    assert bits["kivi-2"] == [3, 3]
    assert bits["turboquant-3"] == [3.25, 3.5]
    assert bits["exl3-3"] == [3.5, 3.5]
