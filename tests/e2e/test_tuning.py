"""Tuning on tiny random models: held-out KL falls, killed runs go on to the same bytes, what is written loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pipeline_quantize import files_of
from tiny_model import SIZES, VOCABULARY, _save_tokenizer, build
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import qpalette
from qpalette.core.errors import ArtifactError, CheckpointError, InputError
from qpalette.core.records import FLOAT16, SIGNS
from qpalette.evaluate import evaluate_models, load_model, token_windows
from qpalette.formats import check_checksums, open_artifact
from qpalette.nn import PackedModule
from qpalette.tuning import Silent, TuneReport, Tuning, descent, forecast, quantize_and_tune, tune
from qpalette.tuning.descent import recomputing
from qpalette.tuning.forecast import memory_bytes
from qpalette.tuning.reference import divergence, logits_of
from qpalette.tuning.run import Subject
from qpalette.tuning.vectors import TunedVectors

WINDOW, WINDOWS = 32, 15
QUICK = Tuning(steps=8, batch=2, window=WINDOW, held_out=3, every=4, save_every=1, learning_rate=5e-3)


pytestmark = pytest.mark.usefixtures("one_thread")


def save_model(directory: Path, kind: str = "llama", seed: int = 0, **sizes: int) -> Path:
    model = build(kind, **sizes)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(1, VOCABULARY, (WINDOW * WINDOWS,), generator=generator).tolist()
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{word}" for word in words))
    return file


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("original") / "model", "llama-bias")


@pytest.fixture(scope="module")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    qpalette.quantize(original, out, spec="nuq-3")
    return out


@pytest.fixture(scope="module")
def tuned(original: Path, quantized: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    return tune(quantized, original, text, tmp_path_factory.mktemp("tuned") / "out", tuning=QUICK)


def held_out_kl(model: Path, original: Path, text: Path) -> float:
    reference, tokenizer = load_model(original)
    windows = token_windows(text, tokenizer, WINDOW)[-QUICK.held_out :]
    return evaluate_models(load_model(model)[0], reference, windows).kl


def test_held_out_kl_falls_and_is_what_the_stored_model_has(tuned, original, quantized, text):
    before, after = held_out_kl(quantized, original, text), held_out_kl(tuned.output, original, text)
    assert tuned.tuned.kl_after < 0.98 * tuned.tuned.kl_before
    assert tuned.tuned.kl_before == pytest.approx(before, rel=1e-3)
    assert tuned.tuned.kl_after == pytest.approx(after, rel=1e-3)


def test_what_is_written_is_a_model_whose_siblings_share_a_diagonal(tuned, quantized):
    check_checksums(tuned.output)
    before, after = open_artifact(quantized), open_artifact(tuned.output)
    assert {record.diagonal for record in after.records.values()} == {FLOAT16}
    groups: dict[str, set[bytes]] = {}
    for name, record in after.records.items():
        assert after.read(f"{name}.qp_codes").equal(before.read(f"{name}.qp_codes"))
        groups.setdefault(record.group, set()).add(after.read(f"{name}.qp_diagonal").numpy().tobytes())
    assert len(groups) < len(after.records)
    assert all(len(diagonals) == 1 for diagonals in groups.values())
    assert after.bits().rate == tuned.bits_after > tuned.bits_before
    changed = [
        name
        for name, stored in after.stored.items()
        if name in before.stored and not after.read(name).equal(before.read(name))
    ]
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"qp_scales", "weight", "bias"}
    assert all(len(after.stored[name].info.shape) == 1 for name in changed)


def test_card_and_report_tell(tuned):
    card = (tuned.output / "README.md").read_text()
    report = json.loads((tuned.output / "qpalette_report.json").read_text())
    assert f"{tuned.tuned.kl_after:.4f} nats" in card
    assert "input diagonal (`qp_diagonal`)" in card
    assert report["totals"]["rate"] == float(open_artifact(tuned.output).bits().rate)
    assert report["tuned"]["steps"] == tuned.tuned.steps > 0
    assert "tuned_steps" in open_artifact(tuned.output).format.provenance


class _Killed(Exception):
    pass


class _Killer(Silent):
    """Stops the run at its n-th word."""

    def __init__(self, at: int) -> None:
        self.left = at

    def progress(self, stage: str, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise _Killed


@pytest.mark.parametrize("cache", [False, True])
def test_killed_it_goes_on_to_the_same_bytes(tuned, original, quantized, text, tmp_path, cache):
    """Whether the original is in memory or its states on disk, and whether activations are kept or not."""
    tuning = Tuning(**{**vars(QUICK), "cache": cache, "recompute": not cache})
    out = tmp_path / "out"
    kills = 0
    while True:
        try:
            tune(quantized, original, text, out, tuning=tuning, watcher=_Killer(4))
            break
        except _Killed:
            kills += 1
            assert not out.exists()
    assert kills >= 3
    assert files_of(out) == files_of(tuned.output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_in_place(tuned, original, quantized, text, tmp_path):
    copy = tmp_path / "out"
    qpalette.quantize(original, copy, spec="nuq-3")
    tune(copy, original, text, tuning=QUICK)
    assert files_of(copy) == files_of(tuned.output)


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_nothing_gained_leaves_every_value(original, quantized, text, tmp_path, rate):
    tuning = Tuning(**{**vars(QUICK), "learning_rate": rate, "patience": 2})
    report = tune(quantized, original, text, tmp_path / "out", tuning=tuning)
    assert report.steps_run == 2 * QUICK.every
    assert report.tuned.steps == 0
    assert report.tuned.kl_after == report.tuned.kl_before
    before, after = open_artifact(quantized), open_artifact(report.output)
    assert before.stored.keys() == after.stored.keys()
    assert all(after.read(name).equal(before.read(name)) for name in after.stored)


def test_quantizing_and_tuning_in_one(original, text, tmp_path):
    """Killed while it tunes, the same call does not quantize again; the size is what was asked for."""
    tuning = Tuning(**{**vars(QUICK), "keep_size": True})
    out, quantized = tmp_path / "out", []

    def told(done: int, total: int, linear: str, distortion: float) -> None:
        quantized.append(linear)

    with pytest.raises(_Killed):
        quantize_and_tune(original, out, text, tuning=tuning, spec="nuq-3", progress=told, watcher=_Killer(4))
    assert len(quantized) == 14
    report = quantize_and_tune(original, out, text, tuning=tuning, spec="nuq-3", progress=told)
    assert len(quantized) == 14
    assert report.tuned.kl_after < report.tuned.kl_before
    assert report.bits_after == report.bits_before
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}
    separate = tmp_path / "separate" / "out"
    qpalette.quantize(original, tmp_path / "plain", spec="nuq-3")
    tune(tmp_path / "plain", original, text, separate, tuning=tuning)
    assert files_of(separate) == files_of(out)


def test_keep_size(original, quantized, text, tmp_path):
    report = tune(quantized, original, text, tmp_path / "out", tuning=Tuning(**{**vars(QUICK), "keep_size": True}))
    assert report.bits_after == report.bits_before
    assert {record.diagonal for record in open_artifact(report.output).records.values()} == {SIGNS}
    assert report.tuned.kl_after < report.tuned.kl_before


def test_in_16_bits(original, quantized, text, tmp_path):
    """Activations alone: what is tuned is better in float32, too."""
    report = tune(quantized, original, text, tmp_path / "out", tuning=QUICK, dtype=torch.bfloat16)
    assert report.tuned.kl_after < report.tuned.kl_before
    assert held_out_kl(report.output, original, text) < held_out_kl(quantized, original, text)


def test_another_original_is_refused_before_any_work(quantized, text, tmp_path):
    other = save_model(tmp_path / "other", "llama-bias", seed=1)
    with pytest.raises(CheckpointError, match="was not made from"):
        tune(quantized, other, text, tmp_path / "out", tuning=QUICK, watcher=_Killer(1))
    with pytest.raises(CheckpointError, match="was not made from"):
        forecast(quantized, other, text, tuning=QUICK)
    assert not (tmp_path / "out").exists()


def test_refusals(original, quantized, text, tmp_path):
    fixture = Path(__file__).parents[1] / "fixtures" / "v2-dense"
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3 " * WINDOW)
    with pytest.raises(InputError, match="held out"):
        tune(quantized, original, short, tmp_path / "out", tuning=QUICK)
    with pytest.raises(ArtifactError, match="exists already"):
        tune(quantized, original, text, original, tuning=QUICK)
    with pytest.raises(InputError, match="steps must be at least 1"):
        Tuning(steps=0)
    with pytest.raises(InputError, match="learning rate"):
        Tuning(learning_rate=math.nan)
    with pytest.raises((ArtifactError, CheckpointError)):
        tune(fixture, original, text, tmp_path / "out", tuning=QUICK)


def test_packed_embeddings_and_a_tied_head_are_tuned_too(text, tmp_path):
    original = save_model(tmp_path / "model")
    out = tmp_path / "out"
    qpalette.quantize(original, out, spec="nuq-3", also=["embed_tokens"])
    report = tune(out, original, text, tuning=QUICK)
    assert report.tuned.kl_after < 0.98 * report.tuned.kl_before
    assert held_out_kl(out, original, text) == pytest.approx(report.tuned.kl_after, rel=1e-3)
    model, _ = load_model(out)
    assert isinstance(model.get_input_embeddings(), PackedModule)


def test_experts_are_tuned_too(text, tmp_path):
    """In Mixtral transformers names them otherwise than the checkpoint does."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.2)).eval()
    mixtral.save_pretrained(tmp_path / "model")
    _save_tokenizer(tmp_path / "model")
    out = tmp_path / "out"
    qpalette.quantize(tmp_path / "model", out, spec="nuq-3")
    before = open_artifact(out)
    experts = [name for name in before.records if "experts" in name]
    scales = {name: before.read(f"{name}.qp_scales") for name in experts}
    report = tune(out, tmp_path / "model", text, tuning=QUICK)
    assert report.tuned.kl_after < report.tuned.kl_before
    after = open_artifact(out)
    assert all(not after.read(f"{name}.qp_scales").equal(scales[name]) for name in experts)
    assert held_out_kl(out, tmp_path / "model", text) == pytest.approx(report.tuned.kl_after, rel=1e-3)


def test_forecast(original, quantized, text):
    found = forecast(quantized, original, text, tuning=QUICK)
    assert found.linears == 14
    assert found.bits_after > found.bits_before
    assert found.tokens_per_step == QUICK.batch * WINDOW
    assert found.seconds > 0
    kept = forecast(quantized, original, text, tuning=Tuning(**{**vars(QUICK), "recompute": False}))
    assert kept.memory_bytes > found.memory_bytes


@pytest.mark.parametrize("cache", [False, True])
def test_the_forecast_counts_codes_that_stay_decoded(cache, original, quantized, monkeypatch):
    """On a GPU, in float32, in a quarter of what is free when both models are there."""
    subject, tuning = Subject.open(quantized, original, False), Tuning(**{**vars(QUICK), "cache": cache})

    def needed(device: str) -> int:
        return memory_bytes(subject, tuning, torch.float32, torch.device(device))

    free = 1 << 40
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    total = 0  # a window at a time
    weights = sum(record.weights for record in subject.artifact.records.values())
    assert needed("cuda") == needed("cpu") + 4 * weights
    free = needed("cpu")  # of which the models are a part
    assert needed("cpu") < needed("cuda") < needed("cpu") + free // 4
    free = 0
    assert needed("cuda") == needed("cpu")
    total = 1 << 40
    assert needed("cuda") > needed("cpu"), "windows that are read side by side are in memory together"


@pytest.mark.parametrize("width", [2, 3])
def test_windows_side_by_side_are_the_same_descent(width, original, quantized, text, tmp_path, monkeypatch):
    tuning = replace(QUICK, batch=3)
    alone = tune(quantized, original, text, tmp_path / "alone", tuning=tuning)
    monkeypatch.setattr(descent, "side_by_side", lambda device, logits_bytes: width)
    together = tune(quantized, original, text, tmp_path / "together", tuning=tuning)
    for (step, kl), (same, other) in zip(alone.looks, together.looks, strict=True):
        assert step == same
        assert other == pytest.approx(kl, rel=1e-4)
    assert together.tuned.kl_after < together.tuned.kl_before


def test_the_gradient_of_the_divergence():
    generator = torch.Generator().manual_seed(0)
    mine, true = (torch.randn(300, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = mine.clone().requires_grad_()
    target = true.log_softmax(-1)
    exact = (target.exp() * (target - leaf.log_softmax(-1))).sum()
    exact.backward()
    gradient = torch.empty_like(mine)
    assert float(divergence(mine, true, gradient)) == pytest.approx(float(exact.detach()), rel=1e-5)
    assert torch.allclose(gradient, leaf.grad, atol=1e-6)


def test_activations_are_computed_again_in_evaluation_mode(quantized):
    """Half of what the backward pass needs, or less, is kept; in training mode some models would drop values."""
    model, _ = load_model(quantized)
    vectors = TunedVectors(model, open_artifact(quantized))
    window = torch.arange(1, WINDOW)
    gradients, kept = [], []
    for again in (False, True):
        sizes: list[int] = []
        with recomputing(model, again), torch.autograd.graph.saved_tensors_hooks(_counting(sizes), lambda x: x):
            assert not any(module.training for module in model.modules())
            logits_of(model, window).square().sum().backward()
        vectors.take_gradient()
        gradients.append(vectors.factors.grad)
        kept.append(sum(sizes))
    assert torch.equal(*gradients)
    assert kept[1] < 0.5 * kept[0]
    assert not any("forward" in vars(module) for module in model.modules())


def _counting(sizes: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    return keep
