"""`qpalette bench`: the harness decodes what generate decodes, and counts what it claims to count."""

from __future__ import annotations

import json
import os
import threading
import weakref
from typing import Any

import pytest
import torch
from test_cli import run, save_model  # noqa: F401 - a fixture
from transformers import LlamaConfig, Qwen3MoeConfig

from qpalette.bench import (
    Candidate,
    Decoder,
    breakdown,
    from_config,
    measure,
    measure_speed,
    read_config,
    stages,
)
from qpalette.bench.breakdown import PARTS, Kernel, part_of, shares_of
from qpalette.bench.models import PRESETS, first_layers, groups_of, records_of, with_head
from qpalette.cli import main
from qpalette.codes import parse_spec
from qpalette.core.environment import PREFILL
from qpalette.core.errors import InputError, SpecError, UnsupportedError
from qpalette.evaluate import bits_per_weight
from qpalette.formats import packed_bits
from qpalette.generation import attach, compile_options, step
from qpalette.nn import PackedModule, QuantLinear
from qpalette.plan import Plan, uniform_plan

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
)


@pytest.fixture(autouse=True)
def _nothing_to_compile(monkeypatch):
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")


@pytest.fixture
def plan() -> Plan:
    return uniform_plan(groups_of(CONFIG).groups, "nuq-4")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("config") / "config.json"
    CONFIG.architectures = ["LlamaForCausalLM"]
    file.write_text(CONFIG.to_json_string(use_diff=False))
    return str(file)


def test_the_decoder_generates_what_generate_does():
    model = from_config("x", CONFIG, None, torch.float32, CPU, None).build()
    decoder = Decoder(model, batch=2, context=9, steps=5)
    torch.manual_seed(3)
    decoder.prefill()
    tokens = [decoder.token.clone()]
    for _ in range(5):
        decoder.step()
        tokens.append(decoder.token.clone())
    torch.manual_seed(3)
    prompt = torch.randint(128, (2, 9))
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, max_new_tokens=6, eos_token_id=None, **options)
    assert torch.equal(torch.cat(tokens, 1), wanted[:, 9:])


def test_the_cache_holds_no_more_steps_than_asked_for():
    model = from_config("x", CONFIG, None, torch.float32, CPU, None).build()
    decoder = Decoder(model, batch=1, context=4, steps=1)
    decoder.prefill()
    decoder.warm_up()
    decoder.step()
    with pytest.raises(InputError, match="the cache is full"):
        decoder.step()


def test_random_packed_weights_take_the_loaders_way(plan):
    model = from_config("x", CONFIG, plan, torch.float16, CPU, None).build()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert layers.keys() == plan.specs.keys()
    assert all(layer.prepared for layer in layers.values())
    assert torch.equal(
        layers["model.layers.0.self_attn.q_proj"].qp_signs, layers["model.layers.0.self_attn.k_proj"].qp_signs
    )
    weight = layers["model.layers.1.mlp.up_proj"].dequantize(torch.float32).weight.detach()
    # A root mean square within five standard errors: 6144 weights, and Lloyd-Max levels taken with equal chance.
    levels = parse_spec("nuq-4").decode(torch.randint(-(1 << 31), 1 << 31, (500, 32), dtype=torch.int32))
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.02 * float(levels.square().mean().sqrt()), rel=0.06)


def test_memory_is_that_of_the_tensors(plan):
    speeds = []
    for chosen in (None, plan):
        candidate = from_config("x", CONFIG, chosen, torch.float16, CPU, None)
        model = candidate.build()
        speed, _ = measure_speed(candidate, model, batch=3, context=8, steps=2, runner="eager")
        speeds.append(speed)
    plain, packed = speeds
    linears = [linear for group in groups_of(CONFIG).groups for linear in group.linears]
    saved = sum(
        2 * linear.weights - packed_bits(parse_spec("nuq-4").rate, linear.out_features, linear.in_features).total // 8
        for linear in linears
    )
    assert plain.weight_bytes - packed.weight_bytes == saved
    assert packed.tokens_per_second == 3 / packed.decode_seconds
    assert packed.prefill_tokens_per_second == 24 / packed.prefill_seconds
    assert (plain.bits_per_weight, packed.random_weights, packed.peak_bytes) == (None, True, None)


def test_the_head_can_be_packed_too(plan):
    for tied, packed in ((False, "lm_head"), (True, "model.embed_tokens")):
        config = LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": tied})
        both = with_head(plan, config, "nuq-8")
        assert both.specs == {**plan.specs, packed: "nuq-8"}
        model = from_config("x", config, both, torch.float32, CPU, None).build()
        assert isinstance(model.get_submodule(packed), PackedModule)
        assert Decoder(model, batch=1, context=4, steps=1).prefill() > 0
    with pytest.raises(SpecError, match=r"model\.norm"):
        records_of(CONFIG, Plan({"model.norm": "nuq-8"}))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    published = {
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "mistral-7b": 7_248_023_552,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-8b": 8_190_735_360,
        "qwen3-30b-a3b": 30_532_122_624,
        "gpt-oss-20b": 20_914_757_184,
        "glm-4.5-air": 106_852_245_504,
        "deepseek-v3": 671_026_404_352,  # without the correction biases of its 58 routers, which are buffers
    }
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == published[name]


def mixture() -> Any:
    return Qwen3MoeConfig(
        **{"vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    )


def test_experts_are_packed_too_and_a_model_may_end_early():
    config = first_layers(mixture(), 2)
    model = from_config("x", config, uniform_plan(groups_of(config).groups, "nuq-4"), torch.float32, CPU, None).build()
    assert len(model.model.layers) == 2
    assert isinstance(model.model.layers[1].mlp.experts.get_submodule("3.down_proj"), PackedModule)
    assert Decoder(model, batch=2, context=4, steps=1).prefill() > 0
    for layers in (0, 4):
        with pytest.raises(InputError, match=f"has 3 layers, and --layers is {layers}"):
            first_layers(mixture(), layers)


def test_one_model_is_gone_before_the_next_is_built(monkeypatch):
    alive, built = [], []

    def build(self):
        alive.append(sum(reference() is not None for reference in built))
        model = from_config("x", CONFIG, None, torch.float32, CPU, None).make()
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Candidate, "build", build)
    one, other = (from_config(name, CONFIG, None, torch.float32, CPU, None) for name in ("one", "other"))
    assert len(list(measure([one, other], (1, 2), (8,), 2, "eager", look=True))) == 4
    assert alive == [0, 0]


def test_each_stage_is_told_of_while_it_goes_on_and_afterwards():
    """At once here; no stage of a second that is over in less."""
    for patience, wanted in ((0.0, ["building", "reading a first prompt", "first steps, runner eager"]), (60.0, [])):
        told = []
        candidate = from_config("tiny", CONFIG, None, torch.float32, CPU, None)
        assert len(list(measure([candidate], (1,), (8,), 2, "eager", told=stages(told.append, patience)))) == 1
        done = [line.partition(": ")[2].rpartition(": ")[0] for line in told if not line.endswith("...")]
        assert done == wanted
    heard = threading.Event()
    with stages(lambda message: heard.set(), 0.0)("waiting"):
        assert heard.wait(60)


# --- where the time goes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("rotate", "rotation"),
        ("multiply", "linears"),
        ("unpack", "linears"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n", "linears"),
        ("void gemvx::kernel<int, int, __half>", "linears"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "linears"),
        ("fmha_cutlassF_f16_aligned_64x128_rf_sm80", "attention"),
        ("pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norms"),
        ("triton_poi_fused_add_cat_cos_mul_sin_1", "attention"),
        ("triton_poi_fused_mul_silu_3", "other"),
    ],
)
def test_kernels_are_known_by_name(name, part):
    assert part_of(name) == part


def test_shares_sum_to_the_time_and_gaps_are_what_is_left():
    names = ["rsqrt_norm", "multiply", "flash_fwd", "multiply", "rsqrt_norm", "gemv_head", "argmax"]
    kernels = [Kernel(name, 10.0 * step + 1.0 * place, 0.75) for step in range(2) for place, name in enumerate(names)]
    shares = {share.part: share for share in shares_of(kernels, seconds=20.0, steps=2)}
    assert tuple(shares) == PARTS
    assert sum(share.seconds for share in shares.values()) == pytest.approx(10.0)
    assert shares["gaps"].seconds == pytest.approx(10 - 7 * 0.75)
    assert shares["lm_head"].kernels == {"gemv_head": 0.75}
    assert shares["linears"].seconds == pytest.approx(1.5)


def test_overlapping_kernels_leave_no_gap_between_them():
    kernels = [Kernel("rotate", 0.0, 2.0), Kernel("multiply", 1.0, 2.0)]
    shares = {share.part: share.seconds for share in shares_of(kernels, seconds=3.0, steps=1)}
    assert (shares["rotation"], shares["lm_head"], shares["gaps"]) == (2, 1, 0)


def test_on_a_cpu_modules_are_timed(plan):
    candidate = from_config("x", CONFIG, plan, torch.float32, CPU, None)
    model = candidate.build()
    _, decoder = measure_speed(candidate, model, batch=1, context=8, steps=2, runner="eager")
    shares = {share.part: share.seconds for share in breakdown(decoder)}
    assert tuple(shares) == PARTS
    assert all(shares[part] > 0 for part in ("linears", "lm_head", "attention", "norms", "other"))
    assert shares["rotation"] == shares["gaps"] == 0
    assert not any(module._forward_hooks for module in model.modules())


def test_options_of_compilation_are_those_that_this_torch_knows(monkeypatch):
    assert compile_options() == step.COMPILE_OPTIONS
    monkeypatch.setitem(step.COMPILE_OPTIONS, "triton.no_such_option", True)
    assert "triton.no_such_option" not in compile_options()


# --- the command -------------------------------------------------------------------------------------------------


def test_bench_prints_a_ratio_in_the_same_run(run, config_file, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speed.png"
    options = ("--batch", 1, "--batch", 2, "--context", 8, "--steps", 2, "--dtype", "float32")
    command = ("bench", "--config", config_file, "--spec", "nuq-4", "--head", "nuq-8", *options)
    kept = tmp_path / "speed.json"
    result = run(*command, "--breakdown", "--plot", picture, "--out", kept, "--json")
    report = json.loads(result.out)
    assert json.loads(kept.read_text()) == report
    assert "batch 2: " in result.err
    assert [(speed["batch"], speed["ratio"] is None) for speed in report["speeds"]] == [
        (1, True),
        (2, True),
        (1, False),
        (2, False),
    ]
    first, _, third, _ = report["speeds"]
    assert third["ratio"] == pytest.approx(third["tokens_per_second"] / first["tokens_per_second"])
    assert all(speed["random_weights"] for speed in report["speeds"])
    assert set(report["breakdown"]) == {first["model"], third["model"]}
    assert picture.read_bytes().startswith(b"\x89PNG")
    bars = tmp_path / "bars.svg"
    alone = run("bench", "--config", config_file, "--batch", 2, "--context", 8, "--steps", 2, "--plot", bars)
    assert (alone.code, "batch size 2" in bars.read_text()) == (0, True)
    shown = run(*command, "--breakdown")
    assert "(random weights)" in shown.out
    assert "Where a step goes" in shown.out


def test_bench_times_prompts_by_each_road(run, config_file, monkeypatch):  # noqa: F811
    monkeypatch.delenv(PREFILL, raising=False)
    options = ("--batch", 1, "--context", 150, "--steps", 2, "--prefills", 1, "--dtype", "float32")
    command = ("bench", "--config", config_file, "--spec", "nuq-4", *options, "--prefill", "float", "--prefill", "int8")
    speeds = json.loads(run(*command, "--json").out)["speeds"]
    assert [speed.get("prefill") for speed in speeds] == [None, "float", "int8"]
    assert [speed["model"].endswith(f"prompts {speed.get('prefill')}") for speed in speeds] == [False, True, True]
    assert all(speed["prefill_seconds"] > 0 for speed in speeds)
    assert PREFILL not in os.environ
    monkeypatch.setenv("QPALETTE_BACKEND", "cpu")
    assert "has no int8 for prompts" in run(*command[:-4], "--alone", "--prefill", "int8").err


def test_bench_of_what_generate_runs(run, config_file, monkeypatch):  # noqa: F811
    from qpalette.bench import generate

    options = ("--batch", 1, "--batch", 3, "--context", 8, "--steps", 12, "--dtype", "float32", "--runner", "generate")
    command = ("bench", "--config", config_file, "--spec", "nuq-4", *options)
    own = {"first_token_seconds", "first_tokens_per_second", "warm_seconds"}
    speeds = json.loads(run(*command, "--json").out)["speeds"]
    assert [(speed["runner"], speed["batch"]) for speed in speeds] == [("generate", batch) for batch in (1, 3, 1, 3)]
    assert all(own <= speed.keys() for speed in speeds)
    assert all(speed["ratio"] is None or speed["ratio"] > 0 for speed in speeds)
    monkeypatch.setattr(
        generate, "fast", lambda model, compile, cache: attach(model, compile, lambda work: Again(work), cache)
    )
    captured = json.loads(run(*command, "--json").out)["speeds"]
    assert all(own | {"warm_seconds"} <= speed.keys() for speed in captured)
    assert "warm: until captured" in " ".join(run(*command).out.split())


class Again:
    """Stands for a CUDA graph."""

    def __init__(self, replay) -> None:
        self.replay = replay


def test_bench_a_model_on_disk(run, tmp_path):  # noqa: F811
    save_model(tmp_path / "tiny")
    with pytest.raises(SystemExit):
        main(["quantize", str(tmp_path / "tiny"), str(tmp_path / "packed"), "--spec", "nuq-4"])
    options = ("--batch", 1, "--context", 8, "--steps", 2, "--dtype", "float32", "--json")
    run("doctor")  # takes what quantize has printed
    speeds = json.loads(run("bench", tmp_path / "packed", "--reference", tmp_path / "tiny", *options).out)["speeds"]
    assert [speed["random_weights"] for speed in speeds] == [False, False]
    assert speeds[0]["bits_per_weight"] is None
    assert speeds[1]["bits_per_weight"] == bits_per_weight(tmp_path / "packed")
    (alone,) = json.loads(run("bench", tmp_path / "packed", "--alone", *options).out)["speeds"]
    assert alone["weight_bytes"] == speeds[1]["weight_bytes"] < speeds[0]["weight_bytes"]
    bare = json.loads(run("bench", tmp_path / "packed", *options).out)["speeds"]
    assert [speed["random_weights"] for speed in bare] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a model or --config"),
        (("--config", "no-such-model", "--spec", "nuq-4"), "known are llama-3.2-1b"),
        (("--config", "{config}", "--spec", "nuq-4", "--plan", "x"), "give either --spec"),
        (("--config", "{config}", "--alone"), "leaves nothing to time"),
        (("--config", "{config}", "--spec", "abc-4"), "'abc-4' is not a quantizer"),
        (("--config", "{config}", "--spec", "nuq-4", "--head", "nuq-99"), "nuq takes"),
        (("--config", "{config}", "--spec", "nuq-4", "--batch", "0"), "must be at least 1"),
        (("--config", "{config}", "--spec", "nuq-4", "--dtype", "int8"), "choose float16"),
        (("--config", "{config}", "--spec", "nuq-4", "--out", "no-such/x.json"), "does not exist; make it"),
        (("--config", "{config}", "--spec", "nuq-4", "--runner", "fast"), "choose eager, graph"),
        (("--config", "{config}", "--spec", "nuq-4", "--runner", "graph"), "needs a CUDA device"),
        (("--config", "{config}", "--spec", "nuq-4", "--context", "300"), "but the model has 256"),
        (("--config", "{config}", "--spec", "nuq-4", "--plot", "x.jpeg"), "must end in .png"),
        (("--config", "{config}", "--runner", "generate", "--steps", "10"), "take --steps 11 or more"),
        (("--config", "{config}", "--runner", "generate", "--breakdown"), "take another runner than generate"),
        (("--config", "{config}", "--runner", "generate", "--context", "250"), "but the model has 256"),
        (("--config", "{config}", "--compile", "now"), "--compile goes with --runner generate"),
        (("--config", "{config}", "--runner", "generate", "--compile", "soon"), "choose never, background, now"),
        (("{config}", "--spec", "nuq-4"), "a model on disk has its own quantizers"),
    ],
)
def test_mistakes_are_one_clear_line(run, config_file, arguments, message):  # noqa: F811
    result = run("bench", *(argument.format(config=config_file) for argument in arguments))
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1


def test_without_matplotlib(run, config_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = run("bench", "--config", config_file, "--spec", "nuq-4", "--plot", tmp_path / "x.png")
    assert (result.code, 'pip install "qpalette[plot]"' in result.err) == (1, True)


def test_a_graph_needs_cuda():
    model = from_config("x", CONFIG, None, torch.float32, CPU, None).build()
    with pytest.raises(UnsupportedError, match="use eager or compile"):
        Decoder(model, 1, 8, 1, "compile-graph")
