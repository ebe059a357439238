"""The launches of a plan are those of the run time: written as the groups of the artifact, joined when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import build
from transformers import AutoModelForCausalLM

import qpalette  # noqa: F401 - teaches transformers the format
from qpalette.formats import open_artifact
from qpalette.models import find_groups
from qpalette.nn import QuantLinear
from qpalette.pipeline import quantize_checkpoint
from qpalette.plan import Plan
from qpalette.storage import open_checkpoint

LAYER = "model.layers.{}."
Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741 - the field's name
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
# What is launched together in a layer, and how many launches of several linears there are then.
CASES = {
    "no plan of launches": ((), 2),
    "each alone": (((Q,), (K,), (V,), (O,), (GATE,), (UP,), (DOWN,)), 0),
    "q alone": (((Q,), (K, V), (O,), (GATE, UP), (DOWN,)), 2),
    "some are not named": (((K, V),), 1),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    build("llama").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_they_are_run(case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    parts, fused = CASES[case]
    launches = tuple(
        tuple(LAYER.format(layer) + name for name in part) for layer in range(2 if parts else 0) for part in parts
    )
    checkpoint = open_checkpoint(source)
    specs = {linear.name: "nuq-4" for group in find_groups(checkpoint).groups for linear in group.linears}
    if case == "some are not named":  # gate and up are still one launch
        fused += 1
    quantize_checkpoint(checkpoint, tmp_path / "out", Plan(specs, launches=launches))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    joined = {m.launch for m in model.modules() if isinstance(m, QuantLinear) and m.launch is not None}
    assert len(joined) == 2 * fused
    names = {module: name for name, module in model.named_modules()}
    for launch in launches:
        members = [model.get_submodule(name) for name in launch]
        if len(members) > 1:
            assert [names[member] for member in members[0].launch.members] == list(launch)
        else:
            assert members[0].launch is None


def test_a_launch_does_not_change_the_bits(source: Path, tmp_path: Path) -> None:
    """Signs are drawn for the group of linears that read one input, whatever its launches."""
    checkpoint = open_checkpoint(source)
    specs = {linear.name: "nuq-4" for group in find_groups(checkpoint).groups for linear in group.linears}
    found = []
    for launches in ((), tuple((name,) for name in specs)):
        output = tmp_path / str(len(launches))
        quantize_checkpoint(checkpoint, output, Plan(specs, launches=launches))
        found.append(open_artifact(output))
    assert all(torch.equal(found[0].read(name), found[1].read(name)) for name in found[0].stored)
