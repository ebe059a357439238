"""Decoded weights for any tool, and plans in other quantizers' words."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_packed_embeddings import IDS, logits, tolerance, write
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qpalette
from qpalette.cli.app import app
from qpalette.core.errors import ArtifactError, CheckpointError, InputError
from qpalette.core.records import LinearRecord
from qpalette.formats import open_artifact
from qpalette.integrations.foreign_plans import exllama_plan, llama_cpp_plan
from qpalette.plan import Plan


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """(source in bfloat16, quantized directory), the tied embedding packed."""
    folder = tmp_path_factory.mktemp("export")
    model = AutoModelForCausalLM.from_pretrained(write(folder / "float32", "qwen3", tied=True), dtype=torch.bfloat16)
    model.save_pretrained(folder / "source")
    (folder / "source" / "tokenizer.json").write_text("{}")
    qpalette.quantize(folder / "source", folder / "out", spec="tcq-3-L12", also=["embed_tokens"])
    return folder / "source", folder / "out"


def export(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_plain_model_is_the_quantized_one(pair, tmp_path):
    source, out = pair
    facts = json.loads(export(out, tmp_path / "plain", "--to", "bf16", "--json"))
    assert facts["tensors"] == len(load_file(source / "model.safetensors"))
    original, plain = load_file(source / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in plain.items()} == {n: (t.shape, t.dtype) for n, t in original.items()}
    packed = open_artifact(out).records
    for name, tensor in original.items():
        assert torch.equal(plain[name], tensor) == (name.removesuffix(".weight") not in packed)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (tmp_path / "plain" / "tokenizer.json").exists()
    assert not (tmp_path / "plain" / "qpalette_report.json").exists()


@pytest.mark.parametrize("to", ["f32", "bf16"])
def test_logits_are_those_of_the_quantized_model(pair, tmp_path, to):
    """Computed in float32. Rounding to bfloat16 changes each weight by at most eps / 2 of itself, independently: a
    linear's output then moves by at most eps / 2 of its norm, in the root mean square; the linears add up."""
    _, out = pair
    export(out, tmp_path / "plain", "--to", to)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    result, wanted = logits(model), logits(plain)
    bound = tolerance(model, wanted)
    if to == "bf16":
        linears = 2 * 7 + 1
        bound += linears * torch.finfo(torch.bfloat16).eps / 2 * float(wanted.norm(dim=-1).max())
    assert 0 < (result - wanted).abs().max() <= bound
    options = {"max_new_tokens": 6, "do_sample": False}
    if to == "f32":
        assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


def test_what_cannot_be_exported(pair, tmp_path):
    source, out = pair
    result = CliRunner().invoke(app, ["export", str(out), str(tmp_path / "x"), "--to", "int4"])
    assert result.exit_code == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    from qpalette.cli import export as command

    with pytest.raises(CheckpointError, match="exists already"):
        command.export(str(out), tmp_path / "full", "bf16")
    with pytest.raises(ArtifactError, match="is not quantized"):
        command.export(str(source), tmp_path / "x", "bf16")
    with pytest.raises(InputError, match="give --model too"):
        command.export(str(tmp_path / "full" / "file"), tmp_path / "x", "llama.cpp")
    with pytest.raises(InputError, match="exists already"):
        command.export(str(out), tmp_path / "full" / "file", "llama.cpp")


CONFIG = {"model_type": "qwen3_moe", "num_hidden_layers": 2}


def record(spec: str, in_features: int = 512) -> LinearRecord:
    return LinearRecord(spec, 64, in_features, "h2", 0)


def test_llama_cpp():
    records = {
        "model.layers.0.self_attn.q_proj": record("tcq-4.375"),  # halfway from IQ4_XS to Q4_K: the smaller
        "model.layers.1.self_attn.o_proj": record("tcq-2.5", 96),  # no multiple of 256: no K quant
        "model.layers.0.mlp.experts.0.gate_proj": record("tcq-2"),
        "model.layers.0.mlp.experts.1.gate_proj": record("tcq-5"),  # stacked: their mean is 3.5
        "lm_head": record("tcq-6.5"),
    }
    plan = llama_cpp_plan(CONFIG, records)
    assert plan.text.splitlines() == [
        r"^blk\.0\.attn_q\.weight$=iq4_xs",
        r"^blk\.1\.attn_output\.weight$=iq4_nl",
        r"^blk\.0\.ffn_gate_exps\.weight$=q3_k",
        r"^output\.weight$=q6_k",
    ]
    assert plan.tensors == 4
    weights = [64 * 512, 64 * 96, 2 * 64 * 512, 64 * 512]
    rates = [4.25, 4.5, 3.4375, 6.5625]
    assert plan.bits == pytest.approx(sum(w * r for w, r in zip(weights, rates, strict=True)) / sum(weights))
    assert all(re.compile(line.partition("=")[0]) for line in plan.text.splitlines())
    with pytest.raises(InputError, match=r"no name for 'model\.layers\.0\.novel'"):
        llama_cpp_plan(CONFIG, {"model.layers.0.novel": record("tcq-4")})
    with pytest.raises(InputError, match="no architecture for 'novel'"):
        llama_cpp_plan({"model_type": "novel"}, records)


def test_exllama():
    yaml = pytest.importorskip("yaml")
    rates = {"model.layers.0.q": "tcq-2.25", "model.layers.0.k": "tcq-3.75", "lm_head": "nuq-2"}
    records = {name: record(spec) for name, spec in rates.items()}
    plan = exllama_plan(records, "it's")
    content = yaml.safe_load(plan.text)
    assert content["sources"] == [
        {"id": "2bpw", "model_dir": "it's-exl3-2bpw"},
        {"id": "4bpw", "model_dir": "it's-exl3-4bpw"},
    ]
    assert {o["key"]: o["source"] for o in content["overrides"]} == {
        "model.layers.0.q": "2bpw",
        "model.layers.0.k": "4bpw",
        "lm_head": "2bpw",
    }
    assert (plan.bits, plan.planned_bits) == (8 / 3, 8 / 3)


def test_plans_of_directories_and_files(pair, tmp_path):
    source, out = pair
    from_directory = export(out, tmp_path / "types.txt", "--to", "llama.cpp")
    assert "planned" in from_directory
    plan = Plan({name: record.spec for name, record in open_artifact(out).records.items()})
    (tmp_path / "plan.json").write_text(plan.to_json())
    export(tmp_path / "plan.json", tmp_path / "again.txt", "--to", "llama.cpp", "--model", source)
    assert sorted((tmp_path / "types.txt").read_text().splitlines()) == sorted(
        (tmp_path / "again.txt").read_text().splitlines()
    )
    export(out, tmp_path / "override.yaml", "--to", "exllamav3")
    assert "source: 3bpw" in (tmp_path / "override.yaml").read_text()
