"""One command from a budget to a model: what it makes is what the steps make, wherever it was stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from functools import partial
from importlib import import_module

import pytest
from test_cli import _plain_output, model, run, save_model, text  # noqa: F401
from transformers import AutoModelForCausalLM, MixtralConfig, NanoChatConfig

import qpalette
from qpalette import recipe
from qpalette.calibration.cache_moments import key_moments
from qpalette.calibration.hessians import HessianStore
from qpalette.core.errors import BudgetError, CheckpointError, SpecError
from qpalette.evaluate.cache import planned_context, stored_plan
from qpalette.formats import open_artifact
from qpalette.plan import Budget
from qpalette.recipe import Recipe, Wish, compress
from qpalette.recipe import run as steps
from qpalette.storage import open_checkpoint
from qpalette.tuning import Tuning

TUNING = Tuning(steps=2, batch=1, window=32, windows=4, held_out=2, every=1, keep_size=True)
SHORT = Recipe(256, window=64, bands=1, effort="fast", tuning=TUNING)
BUDGET = Budget(Fraction(7, 2))
STAGES = ("text", "calibrate", "sensitivities", "quantize", "tuning")


class Stopped(Exception):
    pass


class Stop:
    """Stops in the middle of a stage."""

    def __init__(self, at: str | None = None) -> None:
        self.at, self.told = at, []

    def progress(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.told += [stage] * (self.told[-1:] != [stage])
        if stage == self.at:
            raise Stopped

    def held_out(self, step: int, kl: float) -> None:
        assert kl >= 0


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qpalette.recipe.options.STANDARD", {"cpu": SHORT, "cuda": SHORT})


def content(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.suffix == ".safetensors"}


def test_it_is_what_the_steps_make(model, text, tmp_path):  # noqa: F811
    watcher = Stop()
    found = compress(model, tmp_path / "out", BUDGET, text=text, recipe=SHORT, watcher=watcher)
    assert watcher.told == [stage for stage in STAGES if stage != "text"]
    assert found.tuned.bits_after <= BUDGET.bits
    moments = tmp_path / "moments"
    qpalette.calibrate(model, moments, text, tokens=256, window=64)
    plan = tmp_path / "plan.json"
    plan.write_text(found.planned.plan.to_json())
    qpalette.quantize(model, tmp_path / "rounded", plan=plan, calibration=moments)
    qpalette.tune(tmp_path / "rounded", model, text, tmp_path / "tuned", tuning=replace(SHORT.tuning, seed=0))
    assert content(tmp_path / "out") == content(tmp_path / "tuned")


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(model, tmp_path, stage, monkeypatch):  # noqa: F811
    with pytest.raises(Stopped):
        compress(model, tmp_path / "out", BUDGET, recipe=SHORT, watcher=Stop(stage))
    assert not (tmp_path / "out").exists()
    compress(model, tmp_path / "out", BUDGET, recipe=SHORT)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("out")] == ["out"]
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "another"))
    compress(model, tmp_path / "whole", BUDGET, recipe=SHORT)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_next_budget_measures_nothing_anew(model, text, tmp_path):  # noqa: F811
    compress(model, tmp_path / "first", BUDGET, text=text, recipe=SHORT)
    watcher = Stop()
    compress(model, tmp_path / "second", Budget(Fraction(3)), text=text, recipe=SHORT, watcher=watcher)
    assert watcher.told == ["quantize", "tuning"]
    text.write_text(text.read_text().replace("fox", "cat"))
    watcher = Stop()
    compress(model, tmp_path / "third", Budget(Fraction(3)), text=text, recipe=SHORT, watcher=watcher)
    assert "calibrate" in watcher.told


MEMORY = 5 << 17


def test_a_memory_is_kept_by_weights_and_cache_together(model, text, tmp_path, monkeypatch):  # noqa: F811
    contexts = []

    def moments(model, windows, context, *more):
        contexts.append(context)
        return key_moments(model, windows, context, *more)

    caches = import_module("qpalette.evaluate.cache")
    monkeypatch.setattr(caches, "key_moments", moments)
    monkeypatch.setattr(caches, "SHORTEST", 1)
    watcher = Stop()
    options = {"text": text, "recipe": SHORT, "context": 128}
    found = compress(model, tmp_path / "out", Budget(memory=MEMORY), watcher=watcher, **options)
    assert "cache" in watcher.told
    assert found.planned.memory_bytes <= MEMORY
    assert stored_plan(tmp_path / "out") == found.planned.plan.cache is not None
    assert planned_context(tmp_path / "out") == 128
    packed, tokenizer = qpalette.load(tmp_path / "out", fast=True)
    assert contexts == [128, 128]  # for the plan, and of the result, whose windows are shorter
    packed.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=2)
    watcher = Stop()
    compress(model, tmp_path / "next", Budget(memory=MEMORY), watcher=watcher, **options)
    assert "cache" not in watcher.told


def test_what_a_coded_cache_leaves_is_the_weights(model, text, tmp_path):  # noqa: F811
    wish = partial(Wish.of, model, tmp_path / "out", text=text, recipe=SHORT, context=256)
    memory = wish(Budget(memory=MEMORY), cache="none").draft().overhead.memory + 40_000
    coded, plain = (wish(Budget(memory=memory), cache=cache).draft() for cache in (None, "none"))
    assert plain.plan.cache is None is not coded.plan.cache
    assert max(coded.memory_bytes, plain.memory_bytes) <= memory
    assert coded.planned.choice.bits > plain.planned.choice.bits
    least = coded.overhead.memory + 40_000  # bytes: a cache of 16 bits alone takes 64 kB
    assert wish(Budget(memory=least)).draft().memory_bytes <= least
    with pytest.raises(BudgetError):
        wish(Budget(memory=least), cache="none")


def test_what_a_given_cache_leaves_is_the_weights(model, text, tmp_path):  # noqa: F811
    wish = partial(Wish.of, model, tmp_path / "out", text=text, recipe=SHORT, context=256)
    memory = wish(Budget(memory=MEMORY), cache="none").draft().overhead.memory + 30_000
    plain, eight, three = (
        wish(Budget(memory=memory), cache=cache).draft() for cache in ("none", "white:nuq-8", "white:vq-3")
    )
    assert max(each.memory_bytes for each in (plain, eight, three)) <= memory
    assert plain.planned.choice.bits < eight.planned.choice.bits < three.planned.choice.bits


def test_a_dry_run_tells_the_cache(run, model, text, tmp_path):  # noqa: F811
    options = ["--memory", str(MEMORY), "--context", "256", "--text", str(text), "--dry-run", "--json"]
    said = run("quantize", model, tmp_path / "out", *options)
    cache = json.loads(said.out)["cache"]
    assert (cache["context"], cache["batch"]) == (256, 1)
    assert 0 < cache["bits_per_number"] < 16


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (Budget(Fraction(1, 2)), BudgetError),
        (Budget(size=1000), BudgetError),
        (Budget(memory=1000), BudgetError),
        (Budget(tokens_per_second=5.0), SpecError),
    ],
)
def test_what_cannot_be_is_told_before_the_work(model, text, tmp_path, budget, error, monkeypatch):  # noqa: F811
    monkeypatch.setattr(steps, "calibrate", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(error):
        compress(model, tmp_path / "out", budget, text=text, recipe=SHORT)


def test_a_result_that_could_not_run_is_told_before_the_work(model, text, tmp_path, monkeypatch):  # noqa: F811
    def refused(*arguments):
        raise CheckpointError("could not run the result")

    monkeypatch.setattr(import_module("qpalette.pipeline.quantize"), "rehearse", refused)
    monkeypatch.setattr(steps, "calibrate", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(CheckpointError, match="could not run"):
        compress(model, tmp_path / "out", BUDGET, text=text, recipe=SHORT)


def test_a_calibration_is_told_by_all_that_it_depends_on(model, text):  # noqa: F811
    checkpoint = open_checkpoint(model)
    places = {
        steps.moments_of(checkpoint, text, SHORT, 0),
        steps.moments_of(checkpoint, None, SHORT, 0),
        steps.moments_of(checkpoint, text, SHORT, 1),
        steps.moments_of(checkpoint, text, replace(SHORT, tokens=128), 0),
        steps.moments_of(checkpoint, text, replace(SHORT, window=32), 0),
    }
    assert len(places) == 5
    assert steps.moments_of(checkpoint, text, replace(SHORT, effort="best"), 0) in places


def test_the_command(run, model, text, tmp_path):  # noqa: F811
    command = ("quantize", model, tmp_path / "out", "--bits", "3.5", "--text", text)
    shown = run(*command, "--dry-run")
    assert shown.code == 0, shown.err
    assert all(step in shown.out for step in ("calibrate", "sensitivities", "quantize", "tune", "time needed"))
    planned = json.loads(run(*command, "--dry-run", "--json").out)
    assert planned["seconds"] == pytest.approx(sum(step["seconds"] for step in planned["steps"]))
    assert "written by the model" in run("quantize", model, tmp_path / "out", "--bits", "3.5", "--dry-run").out
    assert not (tmp_path / "out").exists()
    page = tmp_path / "plan.html"
    assert run(*command, "--report", tmp_path / "no" / "plan.html").code == 1
    assert run(*command, "--fast", "--report", page).code == 2
    assert run(*command, "--fast", "--tokens", "64").code == 2
    assert run(*command, "--fast", "--steps", "1").code == 2
    assert "at most 1 steps" in run(*command, "--steps", "1", "--dry-run").out
    assert "128 tokens" in run(*command, "--tokens", "128", "--dry-run").out
    assert run(*command, "--tokens", "1", "--dry-run").code == 2
    result = run(*command, "--json", "--report", page)
    assert result.code == 0, result.err
    assert "3.5 bits per weight" in page.read_text(encoding="utf-8")
    report = json.loads(result.out)
    assert report["bits_per_weight"] <= 3.5
    assert report["kl_after"] <= report["kl_before"]
    assert HessianStore.open(next((tmp_path / "cache" / recipe.run.MOMENTS).iterdir())).two_sided
    assert "held-out KL" in run(*command, "--overwrite").out


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_are_part_of_the_plan(text, tmp_path, tied):  # noqa: F811
    source = tmp_path / "source"
    save_model(source, tied=tied)
    tables = {"model.embed_tokens"} | (set() if tied else {"lm_head"})
    found = compress(source, tmp_path / "out", BUDGET, text=text, recipe=SHORT)
    planned = found.planned.planner.sensitivities.values
    assert tables <= planned.keys()
    assert all(planned[name] > 0 for name in tables)
    records = open_artifact(tmp_path / "out").records
    assert tables <= records.keys()
    assert found.tuned.bits_after <= BUDGET.bits
    assert found.tuned.tuned.kl_after <= found.tuned.tuned.kl_before < 1
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) < before / 3


def test_embeddings_that_a_class_could_not_run_packed_stay(model, text, tmp_path, caplog):  # noqa: F811
    """Of this one no parameter would be left, by which transformers tells a model's type."""
    config = NanoChatConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, source)
    wish = steps.Wish.of(source, tmp_path / "out", BUDGET, text=text, recipe=SHORT)
    assert not {"model.embed_tokens", "lm_head"} & wish.draft().plan.specs.keys()
    assert "model.embed_tokens stay as they are" in caplog.text


@pytest.mark.parametrize(
    ("tied", "pattern", "left"),
    [
        (True, "embed_tokens", set()),
        (True, "lm_head", set()),
        (False, "model.embed_tokens", {"lm_head"}),
        (False, "lm_head", {"model.embed_tokens"}),
    ],
)
def test_excluded_an_embedding_stays(text, tmp_path, tied, pattern, left):  # noqa: F811
    save_model(tmp_path / "source", tied=tied)
    wish = steps.Wish.of(tmp_path / "source", tmp_path / "out", BUDGET, text=text, recipe=SHORT, exclude=[pattern])
    assert {"model.embed_tokens", "lm_head"} & wish.draft().plan.specs.keys() == left


def test_a_calibration_of_before_gets_what_it_lacks(model, text, tmp_path, monkeypatch):  # noqa: F811
    """Without measuring the rest again."""
    qpalette.calibrate(model, tmp_path / "moments", text, tokens=256, window=64)
    whole = qpalette.api.calibrated_sensitivities(model, tmp_path / "moments", bands=1)
    kept = tmp_path / "moments" / qpalette.api.SENSITIVITIES
    kept.write_text(replace(whole, linears=tuple(x for x in whole.linears if x.listed)).to_json())
    monkeypatch.setattr("qpalette.api.curvatures", lambda *a, **k: pytest.fail("measured again"))
    assert qpalette.api.calibrated_sensitivities(model, tmp_path / "moments", bands=1) == whole
    assert {x.name for x in whole.linears if not x.listed} == {"model.embed_tokens", "lm_head"}


@pytest.mark.parametrize("tokens", range(4, 9000, 211))
def test_a_text_of_any_length_leaves_windows_to_tune_on(tokens):
    tuning = steps.fitted(Tuning(), tokens)
    windows = tokens // tuning.window
    assert windows > tuning.held_out
    assert tuning.window <= Tuning().window
    if tokens >= 4 * Tuning().held_out * Tuning().window:
        assert tuning == Tuning()


def test_little_text_is_written_side_by_side():
    """In windows enough for that; a text that is given is cut as usual."""
    usual = Recipe(32_768, window=1024)
    assert usual.of(None, None, None, written=True) == usual
    assert usual.of(6144, 5, "fast", written=True) == replace(
        usual, tokens=6144, window=384, effort="fast", tuning=replace(usual.tuning, steps=5)
    )
    assert usual.of(6144, None, None, written=False).window == usual.window == usual.of(32_768, None, None, True).window


def test_a_short_text_is_enough(model, tmp_path):  # noqa: F811
    short = replace(SHORT, tokens=40, tuning=Tuning(steps=1, batch=1, every=1, keep_size=True))
    compress(model, tmp_path / "out", BUDGET, recipe=short)
    assert open_artifact(tmp_path / "out").records


def test_experts_are_counted_by_those_that_a_token_goes_to(monkeypatch, tmp_path):
    """Time is that of the products made, whatever the number of experts that wait."""
    forecasts = import_module("qpalette.recipe.forecast")
    monkeypatch.setattr(forecasts, "_seconds_per_weight", lambda linear, tokens, device: 1e-9 * tokens)
    seconds = {}
    for experts in (4, 32):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
        directory = tmp_path / str(experts)
        config = MixtralConfig(**sizes, **heads, num_local_experts=experts)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        plan = Wish.of(directory, tmp_path / "out", BUDGET, recipe=SHORT).draft().plan
        steps_of = {step.name: step.seconds for step in forecasts.forecast(directory, None, plan, SHORT, "cpu")}
        seconds[experts] = steps_of["calibrate"]
    assert seconds[32] == pytest.approx(seconds[4])
