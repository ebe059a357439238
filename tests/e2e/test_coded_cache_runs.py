"""Coded caches in what runs them: compiled steps, sessions, commands, bench, servers."""

import copy
import importlib
import json

import pytest
import torch
from coded_models import coded, llama, tokens
from tiny_model import build
from torch._dynamo.backends.registry import lookup_backend
from typer.testing import CliRunner

import qpalette
from qpalette.bench import Decoder
from qpalette.cli.app import app
from qpalette.generation import CodedTokenCache, attach
from qpalette.kvcache import Exact, parse_cache
from qpalette.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.mark.parametrize("attention", ["sdpa", "grouped"])
def test_compiled_it_is_the_same(model, attention):
    """By the kernels' operators: attention over codes, where the attention function takes a layer of them."""
    model, graphs = copy.deepcopy(model), []
    model.set_attn_implementation(attention)
    ids, cache = tokens(2, 9), coded(model, "white:vq-2.5,sinks=2,window=3")

    def keep(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    with torch.no_grad():
        model(ids, past_key_values=cache)
        other = copy.deepcopy(cache)
        step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=keep)
        for seed in range(3):
            token = tokens(2, 1, seed)
            found = step(token, past_key_values=cache).logits
            torch.testing.assert_close(found, model(token, past_key_values=other).logits, rtol=1e-4, atol=1e-4)
    assert cache.is_compileable
    called = {str(node.target).rpartition("cpu_cache_")[2] for node in graphs[0].graph.nodes}
    assert len(graphs) == 1
    assert "write" in called
    assert ("attend" in called, "read" in called) == ((True, False) if attention == "grouped" else (False, True))


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:nuq-3,sinks=2,window=4"])
def test_the_loop_keeps_sessions_of_codes(model, spec):
    """As transformers' own loop over the same cache: greedy, padded, and going on from an earlier prompt."""
    plan, fast = parse_cache(spec), copy.deepcopy(model)
    attach(fast, "never", None, lambda config, length: CodedTokenCache(config, length, plan, None))
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    options = {"max_new_tokens": 9, "do_sample": False}
    for given in ({}, {"attention_mask": mask}):
        padding = given.get("attention_mask")
        own = model.generate(ids, past_key_values=coded(model, spec, padding=padding), **given, **options)
        assert fast.generate(ids, **given, **options).tolist() == own.tolist()
    first = fast.generate(ids[1:], **options)
    longer = torch.cat([first, tokens(1, 2)], 1)
    assert fast.generate(longer, **options)[:, : longer.shape[1]].tolist() == longer.tolist()
    beams = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    own = model.generate(ids, past_key_values=coded(model, spec), **beams)
    assert fast.generate(ids, **beams).tolist() == own.tolist()


def test_a_text_calibrates_in_windows_as_long_as_those_that_are_evaluated(tmp_path, monkeypatch):
    from tiny_model import save_pair

    packed, _ = save_pair(tmp_path, "llama", "nuq-4", max_position_embeddings=512)
    text, read = tmp_path / "text.txt", []
    text.write_text(" ".join(f"t{i % 97}" for i in range(1400)))
    module = importlib.import_module("qpalette.evaluate.cache")
    moments = module.key_moments

    def watch(model, windows, *rest):
        read.append({len(window) for window in windows})
        return moments(model, windows, *rest)

    monkeypatch.setattr(module, "key_moments", watch)
    options = ["--text", str(text), "--cache-text", str(text), "--windows", "1", "--length", "400", "--json"]
    found = CliRunner().invoke(app, ["eval", str(packed), "--cache", "vq-3", *options])
    assert found.exit_code == 0, found.output
    assert read == [{400}]


def test_the_commands(tmp_path, monkeypatch):
    from tiny_model import save_pair

    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "cache"))
    packed, _ = save_pair(tmp_path, "llama", "nuq-4", max_position_embeddings=256)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{i % 97}" for i in range(400)))
    run = CliRunner()
    options = ["--text", str(text), "--windows", "2", "--length", "48", "--length", "96", "--json"]
    found = run.invoke(app, ["eval", str(packed), "--cache", "vq-3", *options])
    assert found.exit_code == 0, found.output
    content = json.loads(found.stdout)
    assert content["kl"] > 0
    assert content["cache_bits"] == 3 + 8 / 16
    assert content["bits_per_weight"] > 4
    assert [entry["context"] for entry in content["lengths"]] == [48, 96]
    assert run.invoke(app, ["eval", str(packed), "--cache", "vq-33", *options]).exit_code == 1
    said = run.invoke(app, ["generate", str(packed), "t1 t2", "--raw", "--cache", "white:vq-3", "--json"])
    assert said.exit_code == 0, said.output
    (packed / "qpalette_cache.json").write_text(parse_cache("white:nuq-2").to_json())
    model, _ = qpalette.load(packed, fast=True)
    assert model.generate.cache(model.config, 9).plan == parse_cache("white:nuq-2")
    (packed / "qpalette_cache.json").unlink()
    plan = Plan({"model.layers.0.mlp.up_proj": "nuq-4"}, cache=parse_cache("white:vq-2"))
    (packed / "qpalette_plan.json").write_text(plan.to_json())
    model, _ = qpalette.load(packed, fast=True)
    assert model.generate.cache(model.config, 9).plan == parse_cache("white:vq-2")
    plain, _ = qpalette.load(packed, fast=True, cache="none")
    assert plain.generate.cache is None
    assert qpalette.cache(plain, max_length=9).plan.exact == Exact(4, 0)


def test_bench_times_codes_beside_the_original(tmp_path):
    config = tmp_path / "config.json"
    build("llama").config.save_pretrained(tmp_path)
    run = CliRunner()
    options = ["--spec", "nuq-4", "--batch", "1", "--context", "8", "--steps", "2", "--dtype", "float32", "--json"]
    found = run.invoke(app, ["bench", "--config", str(config), "--cache", "vq-3", *options])
    assert found.exit_code == 0, found.output
    original, quantized = json.loads(found.stdout)["speeds"]
    assert "cache" not in original
    assert quantized["cache"] == "vq-3"


@pytest.mark.parametrize("runner", ["eager", "generate"])
def test_bench_times_caches_at_contexts_in_one_run(tmp_path, runner):
    """One model with several caches, each row with its own ratio; without prompts no time of one is told."""
    config = tmp_path / "config.json"
    build("llama").config.save_pretrained(tmp_path)
    options = ["--spec", "nuq-4", "--cache", "none", "--cache", "vq-3", "--batch", "1", "--context", "8"]
    options += ["--context", "20", "--runner", runner, "--dtype", "float32", "--json"]
    options += ["--steps", "2", "--prefills", "0"] if runner == "eager" else ["--steps", "12"]
    found = CliRunner().invoke(app, ["bench", "--config", str(config), *options])
    assert found.exit_code == 0, found.output
    speeds = json.loads(found.stdout)["speeds"]
    assert [speed["context"] for speed in speeds] == [8, 20] * 3
    assert [speed.get("cache") for speed in speeds] == [None] * 4 + ["vq-3"] * 2
    assert len({speed["model"] for speed in speeds}) == 3
    for place, speed in enumerate(speeds):
        ratio = None if place < 2 else speed["tokens_per_second"] / speeds[place % 2]["tokens_per_second"]
        assert speed["ratio"] == ratio
        assert (speed["prefill_seconds"] is None) == (runner == "eager")
        assert (speed["prefill_tokens_per_second"] is None) == (runner == "eager")


@pytest.mark.parametrize("cache", [None, "white:vq-3,sinks=2,window=3", "balanced:nuq-3", "vq-3"])
def test_a_filled_cache_is_as_long_as_a_prompt_makes_it(model, cache):
    plan = None if cache is None else parse_cache(cache)
    filled, read = (Decoder(model, 2, 20, 3, cache=plan) for _ in range(2))
    filled.fill()
    read.prefill()
    for decoder in (filled, read):
        assert int(decoder.cache.get_seq_length()) == 20
        decoder.step()
        assert int(decoder.cache.get_seq_length()) == 21
    for layer in filled.cache.layers:
        numbers = layer.values if plan is None else layer.value_stream.read(torch.tensor(20), layer.starts)
        assert numbers[:, :, :20].any(-1).all()


def test_serving_elsewhere_has_its_own_cache():
    run = CliRunner()
    for engine in (["--engine", "vllm"], ["--", "--continuous-batching"]):
        said = run.invoke(app, ["serve", "nowhere", "--cache", "vq-3", *engine])
        assert said.exit_code == 1
        assert "have their own" in said.output
    assert run.invoke(app, ["serve", "nowhere", "--cache", "vq-77"]).exit_code == 1
