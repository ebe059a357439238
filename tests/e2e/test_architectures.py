"""Architectures at odd widths, one by one: quantize, load, compare with the decoded weights, generate, nothing lost."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qpalette.core.errors import ArtifactError, SpecError
from qpalette.formats import open_artifact
from qpalette.models import find_groups
from qpalette.nn import PackedModule, QuantExperts
from qpalette.pipeline import quantize_checkpoint
from qpalette.plan import Plan, uniform_plan
from qpalette.storage import open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from odd_widths import CASES, IDS, check, tolerance, write_model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_architecture(case, tmp_path):
    row = check(case, "tcq-2-L12", tmp_path)
    assert row["linears"] >= 8
    assert float(row["of layers"].split()[0]) > 60


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """(checkpoint, its plan, a quantized directory) of a mixture of experts."""
    folder = tmp_path_factory.mktemp("experts")
    write_model(next(case for case in CASES if case.model_type == "mixtral"), folder / "source")
    checkpoint = open_checkpoint(folder / "source")
    plan = uniform_plan(find_groups(checkpoint).groups, "nuq-3")
    quantize_checkpoint(checkpoint, folder / "out", plan)
    return checkpoint, plan, folder / "out"


def test_experts_save_and_reload_bit_exact(experts, tmp_path):
    out = experts[2]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model.model.layers[0].mlp.experts, QuantExperts)
    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (out, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_experts_dequantize(experts):
    model = AutoModelForCausalLM.from_pretrained(experts[2])
    with torch.inference_mode():
        result = model(IDS).logits
        ordinary = model.dequantize()
        assert not any(isinstance(module, PackedModule) for module in ordinary.modules())
        assert (ordinary(IDS).logits - result).abs().max() <= tolerance(open_artifact(experts[2]), result)


def test_experts_of_a_layer_are_packed_together_or_not_at_all(experts, tmp_path):
    checkpoint, plan, _ = experts
    some = {name: spec for name, spec in plan.specs.items() if not name.endswith("experts.2.w1")}
    with pytest.raises(SpecError, match=r"names 11 of 12 linears in model\.layers\.0\.block_sparse_moe\.experts"):
        quantize_checkpoint(checkpoint, tmp_path / "out", Plan(some))
    attention = {name: spec for name, spec in plan.specs.items() if "experts" not in name}
    quantize_checkpoint(checkpoint, tmp_path / "out", Plan(attention))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, PackedModule) for module in model.modules()) == 8


def test_an_expert_that_is_missing_is_named(experts, tmp_path):
    out = shutil.copytree(experts[2], tmp_path / "out")
    gone = "model.layers.1.block_sparse_moe.experts.3.w2"
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["linears"][gone]
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if gone not in n}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.experts\.3\.w2' is missing, but must be 64 x 88"):
        AutoModelForCausalLM.from_pretrained(out)
