"""Every invariant of docs/format.md, broken one at a time."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpalette.core.errors import ArtifactError
from qpalette.core.records import LinearRecord
from qpalette.formats import QuantizationFormat, expected_tensors, open_artifact

UP = "model.layers.0.mlp.up_proj"
RECORDS = {
    UP: LinearRecord("tcq-3.25", 40, 36, "h36", 0),
    "model.layers.0.mlp.down_proj": LinearRecord("nuq-4", 36, 40, "h20xh2", 0),
}


def tensors() -> dict[str, torch.Tensor]:
    found = {
        f"{name}.{suffix}": torch.ones(shape, dtype=dtype)
        for name, record in RECORDS.items()
        for suffix, (dtype, shape) in expected_tensors(record).items()
    }
    return found | {f"{UP}.bias": torch.zeros(40), "model.norm.weight": torch.ones(36, dtype=torch.bfloat16)}


def write(directory: Path, content: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": QuantizationFormat.of(RECORDS).to_dict()}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(content, directory / "model.safetensors")
    return directory


@pytest.fixture
def good(tmp_path) -> Path:
    return write(tmp_path / "good", tensors())


def test_opens_and_reads(good):
    artifact = open_artifact(good)
    packed = artifact.read_linear(UP)
    assert (packed.spec, packed.rotation, packed.out_features, packed.in_features) == ("tcq-3.25", "h36", 40, 36)
    for name, tensor in load_file(good / "model.safetensors").items():
        read = artifact.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_inspection_counts_every_byte(good):
    info = open_artifact(good).inspect()
    assert info.linears == 2
    assert info.weights == 2 * 36 * 40
    assert info.specs == {"nuq-4": 1440, "tcq-3.25": 1440}
    assert info.carried_tensors == 2
    assert info.tensor_bytes == sum(tensor.nbytes for tensor in tensors().values())
    assert info.bits.total == 8 * sum(tensor.nbytes for name, tensor in tensors().items() if ".qp_" in name)


def without(name):
    return {key: value for key, value in tensors().items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without(f"{UP}.qp_codes"), "qp_codes' is missing"),
        (without(f"{UP}.qp_signs"), "qp_signs' is missing"),
        (tensors() | {f"{UP}.qp_codes": torch.ones(3, 3, 26, dtype=torch.int64)}, "must be torch.int32"),
        (tensors() | {f"{UP}.qp_codes": torch.ones(3, 3, 25, dtype=torch.int32)}, "must be torch.int32 \\(3, 3, 26\\)"),
        (tensors() | {f"{UP}.qp_scales": torch.ones(40, dtype=torch.float16)}, "must be torch.int16"),
        (tensors() | {f"{UP}.qp_extra": torch.ones(1)}, "belongs to no linear"),
        (tensors() | {"other.qp_codes": torch.ones(1)}, "belongs to no linear"),
        (tensors() | {f"{UP}.weight": torch.ones(40, 36)}, "beside packed codes"),
        (tensors() | {f"{UP}.bias": torch.ones(41)}, "must have \\(40,\\)"),
    ],
)
def test_headers_that_break_an_invariant(tmp_path, content, message):
    with pytest.raises(ArtifactError, match=message):
        open_artifact(write(tmp_path / "bad", content))


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])
def test_scales_must_be_finite(tmp_path, bits):
    content = tensors()
    content[f"{UP}.qp_scales"][3] = torch.tensor(bits).to(torch.int16)
    artifact = open_artifact(write(tmp_path / "bad", content))
    with pytest.raises(ArtifactError, match=f"{UP}.qp_scales has a value that is not finite"):
        artifact.read_linear(UP)
    artifact.read_linear("model.layers.0.mlp.down_proj")


def test_sign_padding_must_be_zero(tmp_path):
    content = tensors()
    content[f"{UP}.qp_signs"][-1] = 1 << 4
    artifact = open_artifact(write(tmp_path / "bad", content))
    with pytest.raises(ArtifactError, match=f"{UP}.qp_signs.*beyond the last input"):
        artifact.read_linear(UP)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(good, keep):
    file = good / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"model\.safetensors.*(truncated|header length)"):
        open_artifact(good)


def test_a_file_that_shrinks_after_opening(good):
    artifact = open_artifact(good)
    file = good / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ArtifactError, match="changed since it was opened"):
        artifact.read_linear(UP)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "no safetensors file beside it"),
        ({"a": "model.bin"}, "no safetensors file beside it"),
        ({"a": "model-00001-of-00002.safetensors"}, "is missing"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_index_stays_in_the_directory(good, weight_map, message):
    (good / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(good)


def test_a_tensor_in_two_shards(good):
    (good / "model.safetensors").rename(good / "first.safetensors")
    save_file({"model.norm.weight": torch.ones(36)}, good / "second.safetensors")
    index = {"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight' is in"):
        open_artifact(good)


@pytest.mark.parametrize("names", [("other.safetensors",), ("model.safetensors", "other.safetensors")])
def test_a_whole_file_beside_an_index_of_others(good, names):
    """transformers would read the first and nothing else: what it lacks would be random numbers."""
    save_file({"other": torch.ones(36)}, good / "other.safetensors")
    index = {"weight_map": {name: name for name in names}}
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"model\.safetensors lies beside .*index\.json, which names other files"):
        open_artifact(good)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"quantization_config": 3}', "{}"])
def test_config_that_is_none(good, text):
    (good / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        open_artifact(good)


def test_missing_files_and_names(good, tmp_path):
    with pytest.raises(ArtifactError, match="no quantized linear 'x'"):
        open_artifact(good).read_linear("x")
    with pytest.raises(ArtifactError, match="no tensor 'x'"):
        open_artifact(good).read("x")
    with pytest.raises(ArtifactError, match="is missing"):
        open_artifact(tmp_path / "nowhere")
