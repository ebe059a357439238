"""Sensitivities against exact sums on a tiny model; interruptions; the file."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from qpalette.calibration import sensitivity
from qpalette.calibration.sensitivity import (
    Divergence,
    add_noise,
    embeddings_of,
    fisher_sensitivities,
    noise_generator,
    perturbation_sensitivities,
    weights_of,
)
from qpalette.core.errors import CheckpointError, InputError
from qpalette.core.records import LinearShape
from qpalette.core.resume import PartialFigures
from qpalette.plan import SensitiveLinear, Sensitivities

VOCABULARY = 24
NAMES = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"]
STANDARD_ERRORS = 5  # a fair estimate is this far off once in two million tries


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def window() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (7,), generator=torch.Generator().manual_seed(1))


def exact_sensitivities(model, window) -> dict[str, float]:
    """The definition: the expectation over labels taken token by token, label by label."""
    weights = {name: model.get_submodule(name).weight for name in NAMES}
    total = dict.fromkeys(NAMES, 0.0)
    for position in range(len(window) - 1):
        for label in range(VOCABULARY):
            logs = model(window[None]).logits[0, position].log_softmax(-1)
            gradients = torch.autograd.grad(logs[label], list(weights.values()))
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                square = (gradient.square() * weight.square().mean(1, keepdim=True)).sum()
                total[name] += 0.5 * float((logs[label].exp() * square).detach())
    return {name: value / (len(window) - 1) for name, value in total.items()}


def test_fisher_is_an_unbiased_estimate_of_the_exact_sum(model, window):
    exact = exact_sensitivities(model, window)
    draws = [fisher_sensitivities(model, [window], NAMES, seed=seed) for seed in range(300)]
    for name in NAMES:
        values = torch.tensor([draw[name] for draw in draws])
        error = float(values.std() / len(values) ** 0.5)
        assert abs(float(values.mean()) - exact[name]) < STANDARD_ERRORS * error


def test_noise_raises_the_divergence_as_the_exact_sum_says(model, window):
    """At a distortion of 1e-5 what is beyond second order is below 1 %, as halving the distortion shows."""
    exact = exact_sensitivities(model, window)
    for name in NAMES[:2]:
        seeds = range(100)
        rises = [
            perturbation_sensitivities(model, [window], [name], distortion=1e-5, seed=seed)[name] for seed in seeds
        ]
        values = torch.tensor(rises)
        error = float(values.std() / len(values) ** 0.5)
        assert abs(float(values.mean()) - exact[name]) < STANDARD_ERRORS * error + 0.01 * exact[name]


def test_the_model_is_left_as_it_was(model, window):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fisher_sensitivities(model, [window], NAMES)
    perturbation_sensitivities(model, [window], NAMES)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_noise_is_white_along_rows_and_of_the_asked_size():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)[:, None]
    noisy = weight.clone()
    add_noise(noisy, 0.04, noise_generator(3, "a"))
    relative = (noisy - weight).square().mean(1) / weight.square().mean(1)
    # each of 64 rows is a mean of 512 squares of unit variance: standard deviation sqrt(2 / 512)
    assert (relative / 0.04 - 1).abs().max() < STANDARD_ERRORS * (2 / 512) ** 0.5
    again = weight.clone()
    add_noise(again, 0.04, noise_generator(3, "a"))
    assert torch.equal(again, noisy)


def test_divergence_is_that_of_the_definition(model, window, monkeypatch):
    monkeypatch.setattr(sensitivity, "CHUNK", 4)
    divergence = Divergence(model, [window])
    assert divergence.measure() == 0
    weight = model.get_submodule(NAMES[0]).weight
    original = weight.detach().clone()
    before = model(window[None]).logits[0, :-1].log_softmax(-1)
    try:
        add_noise(weight.data, 0.1, noise_generator(0, "x"))
        after = model(window[None]).logits[0, :-1].log_softmax(-1)
        direct = float((before.exp() * (before - after)).sum(-1).mean().detach())
        assert divergence.measure() == pytest.approx(direct, rel=1e-4)
    finally:
        weight.data.copy_(original)


@pytest.mark.parametrize("method", [fisher_sensitivities, perturbation_sensitivities])
def test_an_interrupted_measurement_goes_on(method, model, window, tmp_path):
    windows, identity = [window, window.flip(0)], {"text": "a"}

    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise Interrupted

    whole = method(model, windows, NAMES)
    file = tmp_path / "x.partial"
    with pytest.raises(Interrupted):
        method(model, windows, NAMES, partial=PartialFigures(file, identity), progress=interrupt)
    steps = []
    partial = PartialFigures(file, identity)
    assert partial.figures
    resumed = method(model, windows, NAMES, partial=partial, progress=lambda done, total: steps.append(done))
    assert resumed == pytest.approx(whole, rel=1e-12)
    assert PartialFigures(file, {"text": "b"}).figures == {}, "figures of another text are not mixed in"
    file.write_text("{")
    assert PartialFigures(file, identity).figures == {}


def test_what_cannot_be_measured_is_named(model, window):
    with pytest.raises(InputError, match="no text"):
        fisher_sensitivities(model, [], NAMES)
    with pytest.raises(InputError, match="no text"):
        perturbation_sensitivities(model, [], NAMES)
    with pytest.raises(CheckpointError, match=r"nowhere\.weight"):
        fisher_sensitivities(model, [window], ["model.nowhere"])


def test_embeddings_are_found_tied_or_not(model):
    assert embeddings_of(model) == ["model.embed_tokens"]
    untied = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": False}))
    assert embeddings_of(untied) == ["model.embed_tokens", "lm_head"]


CSV = "layer,linear,out_features,in_features,sensitivity\n0,self_attn.q_proj,8,4,0.5\n0,self_attn.k_proj,4,4,0.25\n"


def test_csv_becomes_linears_in_their_groups():
    found = Sensitivities.from_csv(CSV)
    assert found.values == {"model.layers.0.self_attn.q_proj": 0.5, "model.layers.0.self_attn.k_proj": 0.25}
    assert [(group.name, len(group.linears)) for group in found.groups] == [("model.layers.0.self_attn.qkv_proj", 2)]


def test_the_file_comes_back(tmp_path):
    linears = (
        SensitiveLinear(LinearShape("a", 8, 4), "g", 0.1),
        SensitiveLinear(LinearShape("e", 9, 4), "e", 1e-9, listed=False),
    )
    found = Sensitivities(linears, {"method": "fisher"})
    file = tmp_path / "s.json"
    file.write_text(found.to_json())
    assert Sensitivities.read(file) == found
    assert [linear.name for linear in found.of_listed.linears] == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CSV + "0,self_attn.q_proj,8,4,0.5\n", "line 4.*second time"),
        (CSV + "1,self_attn.q_proj,8,4,x\n", "line 4"),
        (CSV + "1,self_attn.q_proj,8,4,-1\n", "line 4.*at least 0"),
        (CSV + "1,self_attn.q_proj,8,4,nan\n", "line 4.*at least 0"),
        (CSV + "1,self_attn.q_proj,0,4,1\n", "line 4.*shape"),
        (CSV + "1,self_attn.q_proj\n", "line 4"),
        ("layer,linear\n", "no column out_features"),
        (CSV.splitlines()[0], "no linear"),
    ],
)
def test_bad_csv_is_named(text, message):
    with pytest.raises(InputError, match=message):
        Sensitivities.from_csv(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sensitivity_version": 2}, "version"),
        ({"linears": {}}, "at least one"),
        ({"linears": {"a": {"shape": [8, 4], "group": "g"}}}, "a must have"),
        ({"linears": {"a": {"shape": [8], "group": "g", "sensitivity": 1}}}, "shape of a"),
        ({"linears": {"a": {"shape": [8, 4], "group": "g", "sensitivity": True}}}, "sensitivity of a"),
        ({"provenance": {"tokens": 4}}, "provenance"),
    ],
)
def test_bad_json_is_named(change, message):
    good = Sensitivities((SensitiveLinear(LinearShape("a", 8, 4), "g", 0.1),)).to_json()
    with pytest.raises(InputError, match=message):
        Sensitivities.from_json(json.dumps({**json.loads(good), **change}))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Sensitivities.read(tmp_path / "none.json")
    with pytest.raises(InputError, match="no valid JSON"):
        Sensitivities.from_json("{")


def test_experts_that_transformers_stacks_are_measured_one_by_one():
    """An expert's part of the stacked parameter, by the names of the checkpoint; none is missed, none counted twice."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        initializer_range=0.4,
    )
    mixtral = MixtralForCausalLM(config).eval()
    prefix = "model.layers.0.block_sparse_moe.experts"
    names = [f"{prefix}.{expert}.{leaf}" for expert in range(3) for leaf in ("w1", "w3", "w2")]
    weights = weights_of(mixtral, names)
    assert {tuple(weight.values.shape) for name, weight in weights.items() if name.endswith("w2")} == {(16, 8)}
    assert {tuple(weight.values.shape) for name, weight in weights.items() if not name.endswith("w2")} == {(8, 16)}
    stacked = {weight.parameter for weight in weights.values()}
    assert sum(weight.values.numel() for weight in weights.values()) == sum(p.numel() for p in stacked)
    window = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(1))
    draws = [fisher_sensitivities(mixtral, [window], names, seed=seed) for seed in range(200)]
    for name in (f"{prefix}.0.w1", f"{prefix}.1.w3", f"{prefix}.2.w2"):
        rises = [
            perturbation_sensitivities(mixtral, [window], [name], distortion=1e-5, seed=s)[name] for s in range(60)
        ]
        fisher, noise = torch.tensor([draw[name] for draw in draws]), torch.tensor(rises)
        error = float((fisher.var() / len(fisher) + noise.var() / len(noise)).sqrt())
        assert abs(float(fisher.mean() - noise.mean())) < STANDARD_ERRORS * error + 0.01 * float(noise.mean())
        assert error < 0.2 * float(noise.mean()), "the comparison says something"
