"""What must not load: transformers would fill it with random numbers, here each case is an error that names it."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import edit_config, save_pair
from transformers import AutoConfig, AutoModelForCausalLM

import qpalette
from qpalette.core.errors import ArtifactError, UnsupportedError
from qpalette.integrations.transformers import QPaletteConfig, QPaletteQuantizer
from qpalette.runtime import backends

LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture
def copy(pair, tmp_path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "copy"))


def load(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_quantization(directory: Path, change) -> None:
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    change(quantization)
    edit_config(directory, quantization_config=quantization)


@pytest.mark.parametrize("entrance", [load, qpalette.load])
@pytest.mark.parametrize("suffix", ["qp_codes", "qp_scales", "qp_signs"])
def test_a_missing_tensor(copy, suffix, entrance):
    edit_tensors(copy, lambda tensors: tensors.pop(f"{LINEAR}.{suffix}"))
    with pytest.raises(ArtifactError, match=f"{LINEAR}.{suffix}"):
        entrance(copy)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj.qp_codes", f"{LINEAR}.weight"])
def test_a_tensor_too_many(copy, name):
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(96, 64)}))
    with pytest.raises(ArtifactError, match=name):
        load(copy)


def test_a_scale_that_is_not_finite(copy):
    edit_tensors(copy, lambda tensors: tensors[f"{LINEAR}.qp_scales"].view(torch.float16)[3:4].fill_(float("nan")))
    with pytest.raises(ArtifactError, match=f"{LINEAR}.qp_scales has a value that is not finite"):
        load(copy)


def test_a_tensor_of_another_shape_even_when_told_to_ignore_it(copy):
    edit_tensors(copy, lambda tensors: tensors.update({f"{LINEAR}.qp_scales": torch.zeros(95, dtype=torch.int16)}))
    with pytest.raises(ArtifactError, match=f"{LINEAR}.qp_scales"):
        load(copy, ignore_mismatched_sizes=True)


def test_a_truncated_file(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((ArtifactError, OSError), match=r"truncated|incomplete"):
        load(copy)
    with pytest.raises(ArtifactError, match="truncated"):
        qpalette.load(copy)


def test_a_module_that_the_model_lacks(copy):
    edit_config(copy, num_hidden_layers=1)
    with pytest.raises(ArtifactError, match=r"no module 'model\.layers\.1\.self_attn"):
        load(copy)


def test_a_module_of_another_shape(copy):
    edit_config(copy, intermediate_size=80)
    with pytest.raises(ArtifactError, match=r"mlp\.gate_proj' is 80 x 64 in the model, but 96 x 64"):
        load(copy)


def test_a_module_that_is_no_linear(copy):
    norm, tensors = "model.layers.0.input_layernorm", load_file(copy / "model.safetensors")

    def rename(mapping):
        for name in [name for name in mapping if name.startswith(LINEAR)]:
            mapping[name.replace(LINEAR, norm)] = mapping.pop(name)

    rename(tensors)
    tensors.pop(f"{norm}.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    edit_quantization(copy, lambda quantization: rename(quantization["linears"]))
    with pytest.raises(ArtifactError, match=f"'{norm}' is a LlamaRMSNorm"):
        load(copy)


def test_a_packed_head_that_is_tied(copy):
    head = "lm_head"

    def add(mapping):
        mine = {name: deepcopy(value) for name, value in mapping.items() if name.startswith(LINEAR)}
        mapping |= {name.replace(LINEAR, head): value for name, value in mine.items()}

    edit_config(copy, vocab_size=96)
    edit_tensors(copy, add)
    edit_quantization(copy, lambda quantization: add(quantization["linears"]))
    with pytest.raises(ArtifactError, match="'lm_head' is packed, but config"):
        load(copy)


def test_the_config_of_another_model(copy):
    config = AutoConfig.from_pretrained(copy)
    config.quantization_config["linears"][LINEAR]["spec"] = "nuq-3"
    with pytest.raises(ArtifactError, match="differ"):
        load(copy, config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=4), "format_version is 4"),
        (lambda q: q["linears"][LINEAR].update(spec="nuq-99"), "nuq-99"),
        (lambda q: q["linears"][LINEAR].update(rotation="h7"), "h7"),
        (lambda q: q.update(linears={}), "linears"),
        (lambda q: q.update(surprise=1), "surprise"),
    ],
)
def test_a_config_that_means_nothing(copy, change, message):
    edit_quantization(copy, change)
    with pytest.raises(ArtifactError, match=message):
        load(copy)


def test_a_config_for_a_model_that_is_not_quantized(pair):
    packed, plain = pair
    config = QPaletteConfig.from_dict(json.loads((packed / "config.json").read_text())["quantization_config"])
    with pytest.raises(ArtifactError, match=r"not quantized, .* that of another: .*qpalette\.Config\(bits=4\)"):
        load(plain, quantization_config=config)


def test_no_backend_for_the_device(pair, monkeypatch):
    monkeypatch.setenv("QPALETTE_BACKEND", "cpu")
    quantization = json.loads((pair[0] / "config.json").read_text())["quantization_config"]
    quantizer = QPaletteQuantizer(QPaletteConfig.from_dict(quantization))
    quantizer.validate_environment(device_map={"": "cpu", "model.norm": "disk"})
    quantizer.validate_environment(device_map="auto")
    with pytest.raises(UnsupportedError) as caught:
        quantizer.validate_environment(device_map={"": torch.device("cuda", 0)}, weights_only=True)
    assert "cpu: runs on the cpu, not on cuda" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("QPALETTE_BACKEND", "abacus")
    with pytest.raises(UnsupportedError, match=", ".join(backends())):
        load(pair[0])
