"""`qpalette compare`: models of several makers beside one original, each mishap in its own row."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import model, packed, run, save_model, text  # noqa: F401 - fixtures
from test_quantized_models import FP8, in_fp8
from tiny_model import edit_config
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qpalette.core.cache import private_folder
from qpalette.evaluate import compare as comparing
from qpalette.evaluate import evaluate
from qpalette.evaluate.compare import Compared, compare
from quantized_sources import packed_rows


@pytest.fixture(scope="module")
def fp8(model):  # noqa: F811
    """The same model as another tool has quantized it."""
    directory = shutil.copytree(model, model.parent / "fp8")
    tensors = in_fp8(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    edit_config(directory, quantization_config=FP8)
    return directory


GROUP = 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}


def in_gptq(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every linear of a layer rounded to the nearest of 16 levels, as AutoGPTQ and GPTQModel lay them out."""
    result = dict(tensors)
    for name, weight in tensors.items():
        if weight.ndim == 2 and "layers" in name:
            rows, columns = weight.shape
            groups = weight.float().view(rows, columns // GROUP, GROUP)
            grid = (groups.abs().amax(-1) / 7).half()
            codes = (groups / grid.float()[..., None]).round().clamp(-8, 7).long().view(rows, columns) + 8
            part = name.removesuffix(".weight")
            del result[name]
            result[f"{part}.qweight"] = packed_rows(codes, 4).T
            result[f"{part}.qzeros"] = packed_rows(torch.full((columns // GROUP, rows), 7), 4)  # one less, in version 1
            result[f"{part}.scales"] = grid.T
    return result


def by_bitsandbytes(model, directory):  # noqa: F811
    """nf4, written by transformers and bitsandbytes themselves."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu")
    theirs.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gptq(model):  # noqa: F811
    directory = shutil.copytree(model, model.parent / "gptq")
    tensors = in_gptq(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    edit_config(directory, quantization_config=GPTQ)
    return directory


@pytest.fixture
def stranger(model, tmp_path):  # noqa: F811
    """The same weights, but two letters have changed places in its tokenizer."""
    directory = shutil.copytree(model, tmp_path / "stranger")
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    letters = content["model"]["vocab"]
    letters["o"], letters["q"] = letters["q"], letters["o"]
    file.write_text(json.dumps(content))
    return directory


def test_rows_are_what_eval_measures_and_what_lies_on_disk(run, model, packed, fp8, text):  # noqa: F811
    result = run("compare", model, packed, fp8, "--text", text, "--json", "--no-speed")
    assert result.code == 0, result.err
    original, ours, theirs = json.loads(result.out)["models"]
    assert [row["format"] for row in (original, ours, theirs)] == ["safetensors", "qpalette", "FP8"]
    weights = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    for row, directory in ((original, model), (ours, packed), (theirs, fp8)):
        assert row["file_bytes"] == (directory / "model.safetensors").stat().st_size
        assert row["bits_per_weight"] == 8 * row["file_bytes"] / weights
        assert row["tokens_per_second"] is row["failure"] is None
    assert original["kl"] is original["top1"] is None
    for row, directory in ((ours, packed), (theirs, fp8)):
        alone = evaluate(directory, model, text)
        for name in ("kl", "kl_stderr", "kl_median", "kl_999", "top1", "perplexity"):
            assert row[name] == getattr(alone, name), name
        assert 0 < row["kl_median"] < row["kl_999"]
        assert original["perplexity"] == alone.reference_perplexity


def test_peers_of_four_bits_are_measured(run, model, gptq, text, tmp_path):  # noqa: F811
    """Of a model of random weights, each loses about what four bits a weight lose, and no more than twice the other."""
    theirs = by_bitsandbytes(model, tmp_path / "nf4")
    result = run("compare", model, gptq, theirs, "--text", text, "--json", "--no-speed")
    assert result.code == 0, result.err
    original, *peers = json.loads(result.out)["models"]
    assert [row["format"] for row in peers] == ["GPTQ", "bitsandbytes"]
    for row, directory in zip(peers, (gptq, theirs), strict=True):
        assert row["failure"] is None
        assert row["file_bytes"] == (directory / "model.safetensors").stat().st_size < original["file_bytes"]
        assert row["kl"] == evaluate(directory, model, text).kl
    one, other = (row["kl"] for row in peers)
    assert 0 < one < 2 * other < 4 * one


def test_a_mishap_is_one_row_and_the_others_go_on(run, model, packed, stranger, text, tmp_path):  # noqa: F811
    damaged, wide = shutil.copytree(packed, tmp_path / "damaged"), tmp_path / "wide"
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(model, wide)
    tensors = load_file(wide / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, wide / "model.safetensors")
    edit_config(wide, vocab_size=256)
    bad = {"missing": "does not exist", "damaged": "", "stranger": "tokenizer is not", "wide": "256 and 128 tokens"}
    models = [tmp_path / name for name in bad]
    result = run("compare", model, *models, packed, "--text", text, "--json", "--no-speed")
    assert result.code == 1
    rows = json.loads(result.out)["models"]
    assert [row["model"] for row in rows] == list(map(str, [model, *models, packed]))
    for row, (name, told) in zip(rows[1:], bad.items(), strict=False):
        assert told in row["failure"], name
        assert row["kl"] is None
        assert f"error: {tmp_path / name}: {row['failure']}" in result.err
    assert rows[-1]["failure"] is None
    assert rows[-1]["kl"] > 0


def test_the_table_and_the_speeds(run, model, packed, fp8, text, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.svg"
    result = run("compare", model, packed, fp8, tmp_path / "missing", "--text", text, "--plot", picture)
    assert result.code == 1
    lines = {directory: next(line for line in result.out.splitlines() if str(directory) in line and "│" in line)
             for directory in (model, packed, fp8)}  # fmt: skip
    for line in lines.values():
        assert float(line.split("│")[-2]) > 0, "tokens per second"
    assert "failed" in result.out
    assert f"{fp8}: decoded once" in result.err
    drawn = picture.read_text()
    assert drawn.count("<!-- packed -->") == drawn.count("<!-- fp8 -->") == 1


def test_a_speed_that_cannot_be_measured_keeps_the_rest(run, model, packed, text, tmp_path):  # noqa: F811
    short = shutil.copytree(model, tmp_path / "short")
    edit_config(short, max_position_embeddings=64)
    result = run("compare", model, short, packed, "--text", text, "--json")
    assert result.code == 1
    rows = json.loads(result.out)["models"]
    assert "speed could not be measured (context and steps need" in rows[1]["failure"]
    assert rows[1]["kl"] == 0
    assert [row["tokens_per_second"] is not None for row in rows] == [True, False, True]


def test_one_model_at_a_time_and_the_original_once(model, packed, fp8, text, monkeypatch):  # noqa: F811
    alive: list[weakref.ref] = []
    loaded = []

    def load_model(path, *arguments):
        gc.collect()
        assert not any(layer() is not None for layer in alive), "the model before is still there"
        found, tokenizer = load(path, *arguments)
        loaded.append(path)
        alive.append(weakref.ref(found.model.layers[0]))
        return found, tokenizer

    load = comparing.load_model
    monkeypatch.setattr(comparing, "load_model", load_model)
    seen = []
    rows = compare(model, [packed, "missing", fp8], text, progress=lambda *given: seen.append(given))
    assert loaded == [model, packed, fp8]
    assert [row.failure is None for row in rows] == [True, True, False, True]
    assert list(private_folder("compared").iterdir()) == [], "what the original made of the text"
    of_text = len(seen[: seen.index(seen[-1])]) // 3  # windows of each that ran; the missing one's come in one step
    assert {total for _, total in seen} == {4 * of_text}
    assert [done for done, _ in seen] == [n for n in range(1, 4 * of_text + 1) if not 2 * of_text < n < 3 * of_text]


def test_the_bound_is_that_of_the_plan(run, model, text, tmp_path):  # noqa: F811
    """What no code can do better than, at the artifact's own bits: its plan predicts more."""
    sensitivities, out = tmp_path / "sensitivities.json", tmp_path / "planned"
    assert run("sensitivity", model, sensitivities, "--text", text).code == 0
    assert run("quantize", model, out, "--bits", "4", "--sensitivity", sensitivities).code == 0
    planned = compare(model, [out], text)[1]
    assert planned == Compared(**vars(planned))
    assert 0 < planned.kl_bound < evaluate(out, model, text).predicted_kl


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "{tmp}/none.txt"), "does not exist"),
        (("--text", "{text}", "--windows", "0"), "at least 1"),
        (("--text", "{text}", "--plot", "{tmp}/p.gif"), "must end in .png"),
        (("--text", "{text}", "--device", "cuda:99"), "cuda:99"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(run, model, text, tmp_path, monkeypatch, arguments, message):  # noqa: F811
    monkeypatch.setattr(comparing, "load_model", None)
    result = run("compare", model, model, *(part.format(tmp=tmp_path, text=text) for part in arguments))
    assert result.code == 1
    assert message in result.err
    assert result.err.startswith("error: ")
