"""Coded caches in transformers: `generate` of every kind, what is refused, and that measurements read codes."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from tiny_model import VOCABULARY, build
from torch._dynamo.backends.registry import lookup_backend
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import qpalette
from qpalette.bench import Decoder
from qpalette.calibration.attention_taps import watched
from qpalette.calibration.cache_moments import cost_of_errors, key_moments, spread_offsets, stream_costs
from qpalette.cli.app import app
from qpalette.core.errors import InputError, SpecError, UnsupportedError
from qpalette.evaluate.cache import evaluate_cache, transforms_for
from qpalette.evaluate.cache_baselines import BASELINES, BaselineCache
from qpalette.generation import CodedTokenCache, attach
from qpalette.kvcache import Exact, parse_cache
from qpalette.nn.coded_cache import CodedCache, check_cacheable
from qpalette.plan import Plan
from qpalette.runtime import select

pytestmark = pytest.mark.usefixtures("one_thread")
FINE = "white:nuq-8,sinks=2"  # near enough for the same tokens where they are far apart


@pytest.fixture(scope="module")
def model():
    return build("llama", max_position_embeddings=256)


def tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def coded(model, spec: str, length: int = 64, **options) -> CodedCache:
    return CodedCache(model.config, parse_cache(spec), length, **options)


def logits_step_by_step(model, ids, cache):
    with torch.no_grad():
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])], 1)


def test_generate_takes_it(model):
    ids = tokens(2, 7)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    found = model.generate(ids, past_key_values=coded(model, FINE), **options)
    # Tokens may part where two are near; the first logits come from the exact prompt, the next from codes.
    torch.testing.assert_close(found.logits[0], plain.logits[0], rtol=1e-4, atol=1e-4)
    assert (found.logits[1] - plain.logits[1]).abs().max() > 1e-4
    assert (found.logits[1] - plain.logits[1]).norm() < 0.1 * plain.logits[1].norm()


def test_the_public_call(model, tmp_path):
    cache = qpalette.cache(model, "white:vq-3", 40)
    assert model.generate(tokens(1, 5), past_key_values=cache, max_new_tokens=4, do_sample=False).shape == (1, 9)
    assert float(cache.bits) == 3 + 8 / 16
    with pytest.raises(SpecError):
        qpalette.cache(model, "vq-33", 40)
    with pytest.raises(InputError, match="say which cache"):
        qpalette.cache(model)


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:nuq-3,sinks=3,window=5", "white:vq4-2,sinks=0"])
def test_one_call_or_many_give_the_same(model, spec):
    """However a prompt is cut, each token reads the same codes; with a window, no more exact tokens than alone."""
    ids = tokens(2, 30)
    whole = coded(model, spec, own_exact=False)
    with torch.no_grad():
        at_once = model(ids, past_key_values=whole).logits
    alone = logits_step_by_step(model, ids, coded(model, spec, own_exact=False))
    if whole.feed is None:
        torch.testing.assert_close(at_once, alone, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(at_once[:, -1], alone[:, -1], rtol=0.5, atol=2.0)
        assert whole.feed == 2


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


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:vq-2,sinks=2,window=5"])
def test_padding_on_the_left_changes_nothing(model, spec):
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :4], mask[1, :1] = 0, 0
    cache = coded(model, spec, padding=mask)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=cache)
    for row, pads in enumerate((4, 1, 0)):
        alone = ids[row : row + 1, pads:]
        own = model.generate(alone, max_new_tokens=10, do_sample=False, past_key_values=coded(model, spec))
        assert found[row, pads:].tolist() == own[0].tolist()


def test_padding_on_the_right_changes_nothing(model):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    spec = "white:vq-2,sinks=2"
    with torch.no_grad():
        both = model(ids, attention_mask=mask, past_key_values=coded(model, spec)).logits
        alone = model(ids[:1, :9], past_key_values=coded(model, spec)).logits
    torch.testing.assert_close(both[:1, :9], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:vq-2,sinks=1,window=4"])
def test_beams_are_reordered(model, spec):
    """Each beam's score is what its tokens have when they go through a cache alone."""
    ids = tokens(2, 6)
    options = {"num_beams": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    cache = coded(model, spec)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=8, length_penalty=0.0, **options)
    for row in range(2):
        cache = coded(model, spec)
        with torch.no_grad():
            first = model(ids[row : row + 1], past_key_values=cache).logits[:, -1:]
            later = logits_step_by_step(model, found.sequences[row : row + 1, 6:-1], cache)
        scores = torch.cat([first, later], 1)[0].log_softmax(-1)
        own = scores.gather(-1, found.sequences[row, 6:, None]).sum()
        assert float(found.sequences_scores[row]) == pytest.approx(float(own), rel=1e-3)


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:vq-2,sinks=2,window=6"])
def test_cropped_it_goes_on_as_if_the_rest_had_never_come(model, spec):
    ids, cache, other = tokens(2, 40), coded(model, spec), coded(model, spec)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-15)
        assert int(cache.get_seq_length()) == 25
        model(ids[:, :25], past_key_values=other)
        if parse_cache(spec).exact.window:
            other.crop(0)
            for layer in other.layers:  # what leaves a window is coded, and does not come back by a cut
                for stream in layer.streams:
                    stream.ring_tokens[stream.ring_tokens < 34] = -1
        more = tokens(2, 3, seed=5)
        a, b = (logits_step_by_step(model, more, one) for one in (cache, other))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    with torch.no_grad():
        again = model(ids, past_key_values=cache).logits
        fresh = model(ids, past_key_values=coded(model, spec)).logits
    assert torch.equal(again, fresh)


def test_a_prompt_longer_than_the_cache_is_refused(model):
    cache = coded(model, FINE, length=8)
    with pytest.raises(InputError, match="room for 8 tokens, not for 9"):
        model(tokens(1, 9), past_key_values=cache)
    model(tokens(1, 8), past_key_values=cache)
    with pytest.raises(InputError, match="room for 8 tokens, not for 9"):
        model(tokens(1, 1), past_key_values=cache)
    with pytest.raises(InputError, match="mask of 2 sequences, and gets 3"):
        model(tokens(3, 2), past_key_values=coded(model, FINE, padding=torch.ones(2, 2)))


def test_a_type_without_kernels_runs_by_the_definition(model):
    ids, cache, spec = tokens(1, 20), coded(model, FINE), "white:nuq-8,sinks=2"
    exact = copy.deepcopy(model).double()
    found = logits_step_by_step(model, ids, cache)
    wide = coded(exact, spec, length=20)
    torch.testing.assert_close(found, logits_step_by_step(exact, ids, wide).float(), rtol=1e-2, atol=1e-2)
    assert wide.layers[0].key_stream.sinks.dtype == torch.float64
    with pytest.raises(InputError, match="room for 20 tokens, not for 21"):
        logits_step_by_step(exact, ids[:, :1], wide)


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


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_a_first_prompt_is_not_decoded(kind, monkeypatch):
    """It attends to itself as it came; what follows, and a prompt whose mask is for the whole cache, reads codes."""
    options = {} if kind == "llama" else {"sliding_window": 8}
    options |= {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "gpt_oss" else {}
    model, seen = small(kind, **options), []
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :5] = 0
    kernels = type(select("cache", "nuq-2", model.device))
    read = kernels.stream.read
    monkeypatch.setattr(kernels.stream, "read", lambda self, *given: (seen.append(self), read(self, *given))[1])
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            cache = coded(model, "white:nuq-2", padding=given.get("attention_mask"))
            found = model(ids, past_key_values=cache, **given).logits
            wanted = model(ids, **given).logits
            torch.testing.assert_close(found[:, 5:], wanted[:, 5:], rtol=1e-4, atol=1e-4)
        assert not seen
        model(ids[:, :3], past_key_values=cache)
        assert len(seen) == 4
        cache.reset()
        seen.clear()
        model(ids, past_key_values=cache)
        assert not seen
        model(ids, past_key_values=coded(model, "white:nuq-2", own_exact=False))
        assert len(seen) == 4


def test_a_prompt_with_a_mask_of_its_own_is_read_by_it(model):
    ids, cache = tokens(1, 9), coded(model, FINE, length=12)
    mask = torch.ones(9, 12, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        found = model(ids, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def small(kind: str, **options):
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(common | options))).eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": 8}),
        (
            "gemma2",
            {"sliding_window": 8, "attn_implementation": "eager"},
        ),  # soft caps, and windows in every other layer
        ("gpt_oss", {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),  # learned sinks
        ("qwen2", {}),
        ("phi3", {"pad_token_id": 0}),
    ],
)
def test_windows_soft_caps_and_learned_sinks_are_the_models_own(kind, options):
    model = small(kind, **options)
    window = tokens(1, 40)[0]
    assert evaluate_cache(model, None, "white:nuq-8,sinks=0", [window]).kl < 1e-4
    assert evaluate_cache(model, None, "white:nuq-2,sinks=0", [window]).kl > 0


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (AutoConfig.for_model("deepseek_v3"), "latent attention"),
        (AutoConfig.for_model("mamba2"), "Linear"),
        (AutoConfig.for_model("t5"), "encoder"),
    ],
)
def test_what_cannot_be_coded_is_refused_by_name(config, name):
    with pytest.raises(UnsupportedError, match=name):
        check_cacheable(config)


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
