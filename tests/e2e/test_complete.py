"""What a model class needs is all there and finite, or nothing is written and nothing answers from random numbers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline_quantize import write_llama
from tiny_model import _save_tokenizer

import qpalette
from qpalette.core.errors import ArtifactError, CheckpointError
from qpalette.evaluate import load_model
from qpalette.models import check_complete
from qpalette.models.model_class import build_on_meta
from qpalette.storage import Checkpoint, open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from odd_widths import CASES, write_model


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model_type)
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    write_model(request.param, folder)
    opened = open_checkpoint(folder)
    if build_on_meta(opened.config) is None:
        pytest.skip("transformers builds no class from this config")
    return opened


def test_what_transformers_saves_is_complete(checkpoint):
    check_complete(checkpoint)


def test_any_tensor_of_the_first_layer_or_outside_may_be_the_one_that_is_missing(checkpoint):
    """Experts are stacked while loading: transformers calls a missing one a failed conversion."""
    whole = dict(checkpoint.tensors)
    for gone in whole:
        if ".1." in gone and "experts" not in gone:
            continue
        checkpoint.tensors = {name: info for name, info in whole.items() if name != gone}
        with pytest.raises(CheckpointError, match="has no tensor") as caught:
            check_complete(checkpoint)
        assert gone.rpartition(".")[0].rpartition(".")[2] in str(caught.value)
    checkpoint.tensors = whole


def test_a_shape_that_the_config_does_not_mean(checkpoint):
    whole = dict(checkpoint.tensors)
    name = next(name for name in whole if "norm" in name or "ln_1" in name)
    checkpoint.tensors = whole | {name: replace(whole[name], shape=(whole[name].shape[0] + 1,))}
    with pytest.raises(CheckpointError, match=r"has shape \(\d+,\), but config\.json asks for \(\d+,\)"):
        check_complete(checkpoint)
    checkpoint.tensors = whole


def test_a_type_that_is_no_number_of_the_class(tmp_path):
    """Whose name gives nothing away: a weight's or a scale's is told by `open_checkpoint` already."""
    directory = tmp_path / "source"
    write_model(next(case for case in CASES if case.model_type == "qwen2"), directory)
    checkpoint = open_checkpoint(directory)
    name = "model.layers.0.self_attn.q_proj.bias"
    checkpoint.tensors = dict(checkpoint.tensors) | {name: replace(checkpoint.tensors[name], dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"q_proj\.bias' is torch\.int8, where the model class has a float"):
        check_complete(checkpoint)


def edited(source: Path, **changes: torch.Tensor | None) -> Path:
    """`changes` maps tensor names with "__" for "." to their values, or None to remove them."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, file, {"format": "pt"})
    return source


@pytest.fixture
def source(tmp_path) -> Path:
    directory = write_llama(tmp_path / "source")
    (directory / "tokenizer.json").unlink()
    _save_tokenizer(directory)
    return directory


GONE = {"model__layers__1__mlp__up_proj__weight": None}


def spoiled(number: float) -> dict[str, torch.Tensor]:
    norm = torch.ones(64)
    norm[7] = number
    return {"model__norm__weight": norm.bfloat16()}


@pytest.mark.parametrize(
    ("change", "name"),
    [(GONE, "up_proj"), (spoiled(torch.nan), "model.norm.weight"), (spoiled(torch.inf), "model.norm.weight")],
    ids=["missing", "NaN", "infinity"],
)
def test_nothing_is_written_and_nothing_answers(change, name, source, tmp_path):
    edited(source, **change)
    with pytest.raises(CheckpointError, match=name):
        qpalette.quantize(source, tmp_path / "out", spec="nuq-4")
    left = [file.name for file in tmp_path.rglob("*") if file.is_file() and source not in file.parents]
    assert all(file == "lock" or file.endswith(".lock") for file in left), left
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 " * 100)
    for use in (
        lambda: load_model(source),
        lambda: qpalette.load(source),
        lambda: qpalette.calibrate(source, tmp_path / "hessians", text, tokens=32, window=16),
    ):
        with pytest.raises(CheckpointError, match=name):
            use()


def test_a_dry_run_says_it_too(source, tmp_path):
    edited(source, **GONE)
    with pytest.raises(
        CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight of its model class"
    ):
        qpalette.quantize(source, tmp_path / "out", spec="nuq-4", dry_run=True)


def test_a_quantized_model_that_has_lost_what_it_carried(source, tmp_path):
    qpalette.quantize(source, tmp_path / "out", spec="nuq-4")
    edited(tmp_path / "out", model__norm__weight=None)
    with pytest.raises(ArtifactError, match=r"no tensor for model\.norm\.weight"):
        qpalette.load(tmp_path / "out")
