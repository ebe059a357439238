"""Another tool's quantized checkpoint: decoded exactly under plain names, or refused by name, never taken as it is."""

import copy
import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from qpalette.core.errors import CheckpointError
from qpalette.storage import export_checkpoint, open_checkpoint
from qpalette.storage.content import content_digest
from quantized_sources import SOURCES, UP, Source, awq, fp8_blocks, gptq, numbers, pack_quantized, packed_rows

EVERY = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())


@EVERY
def test_decoded_under_its_plain_name_one_tensor_at_a_time(make, tmp_path):
    source: Source = make()
    checkpoint = open_checkpoint(source.write(tmp_path / "in"))
    assert set(checkpoint.tensors) == {source.name, "model.norm.weight"}
    info, read = checkpoint.tensors[source.name], checkpoint.read(source.name)
    assert info.shape == source.weight.shape == read.shape
    assert info.dtype == source.weight.dtype == read.dtype
    assert torch.equal(read, source.weight)
    assert torch.equal(checkpoint.read_part(source.name, 1), source.weight[1])
    checkpoint.check_values(["model.norm.weight"])
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.total_bytes == read.nbytes + 16

    export_checkpoint(checkpoint, tmp_path / "out")  # what loads as the reference: `plain_directory`
    plain = open_checkpoint(tmp_path / "out")
    assert plain.format == "safetensors" != checkpoint.format
    assert torch.equal(plain.read(source.name), source.weight)
    assert "quantization_config" not in plain.config


def parts(make) -> list[str]:
    source = make()
    return [name for name in source.tensors if name not in source.optional]


PARTS = [(make, part) for make in SOURCES.values() for part in parts(make)]
EACH_PART = pytest.mark.parametrize(
    ("make", "part"), PARTS, ids=[f"{name}: {part}" for name, make in SOURCES.items() for part in parts(make)]
)


@EACH_PART
def test_a_part_that_is_missing_is_told_before_the_work(make, part, tmp_path):
    source = make()
    del source.tensors[part]
    with pytest.raises(CheckpointError, match=r"up_proj|w1"):
        open_checkpoint(source.write(tmp_path))


# What a single scale belongs to may have any shape: it is the model class that asks for one (`check_complete`).
SHAPED = [(make, part) for make, part in PARTS if (make, part) != (SOURCES["fp8 tensor"], f"{UP}.weight")]


@pytest.mark.parametrize(("make", "part"), SHAPED)
def test_a_part_of_another_shape_is_told_before_the_work(make, part, tmp_path):
    source = make()
    tensor = source.tensors[part]
    source.tensors[part] = torch.zeros(2 * len(tensor) if tensor.ndim else 2, *tensor.shape[1:], dtype=tensor.dtype)
    with pytest.raises(CheckpointError, match=r"up_proj|w1"):
        open_checkpoint(source.write(tmp_path))


@EACH_PART
def test_a_part_of_another_type_is_told_before_the_work(make, part, tmp_path):
    source = make()
    source.tensors[part] = torch.zeros(source.tensors[part].shape, dtype=torch.complex64)
    with pytest.raises(CheckpointError, match=r"up_proj|w1"):
        open_checkpoint(source.write(tmp_path))


def is_scale(tensor: torch.Tensor, part: str) -> bool:
    return tensor.dtype.is_floating_point and not part.endswith((".weight", "gate_up_proj"))


SCALES = [(make, part) for make, part in PARTS if is_scale(make().tensors[part], part)]


@pytest.mark.parametrize(("make", "part"), SCALES)
def test_a_scale_that_is_not_finite_is_told_before_the_work(make, part, tmp_path):
    source = make()
    if source.tensors[part].dtype == torch.float8_e8m0fnu:
        source.tensors[part].view(torch.uint8).view(-1)[0] = 255  # its only NaN
    else:
        source.tensors[part].view(-1)[0] = torch.nan
    checkpoint = open_checkpoint(source.write(tmp_path))
    for use in (lambda: checkpoint.check_values([]), lambda: checkpoint.read(source.name)):
        with pytest.raises(CheckpointError, match=part.replace(".", r"\.")):
            use()


@EVERY
def test_without_a_word_in_the_config_it_is_refused(make, tmp_path):
    """Of every format: the tensors alone give it away, and nothing says exactly what they mean."""
    source = make()
    source.quantization = {}
    with pytest.raises(CheckpointError, match=r"quantized already \(tensor '.*config\.json does not say how"):
        open_checkpoint(source.write(tmp_path))


def test_a_method_that_nobody_knows_is_named(tmp_path):
    source = replace(awq(), quantization={"quant_method": "quip"})
    with pytest.raises(CheckpointError, match=r"quantized already \(method 'quip'\); give the 16-bit original"):
        open_checkpoint(source.write(tmp_path))


def test_a_config_that_says_more_than_the_files_hold(tmp_path):
    source = fp8_blocks()
    source.tensors = {source.name: source.weight}
    with pytest.raises(CheckpointError, match=r"config\.json says FP8, but no tensor is stored so; .* remove"):
        open_checkpoint(source.write(tmp_path))


def test_a_weight_that_is_there_twice(tmp_path):
    source = awq()
    source.tensors[source.name] = source.weight
    with pytest.raises(CheckpointError, match="stored twice"):
        open_checkpoint(source.write(tmp_path))


def test_one_weight_among_many_that_its_format_does_not_explain(tmp_path):
    source = fp8_blocks()
    source.tensors["model.layers.0.mlp.down_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.down_proj\.qweight' is int32, GPTQ or AWQ"):
        open_checkpoint(source.write(tmp_path))


UNREAD = {
    "marlin": (lambda: gptq(4, 1, False, True), {"checkpoint_format": "marlin"}, "GPTQ; checkpoint_format 'marlin'"),
    "gemv": (awq, {"version": "gemv"}, "AWQ of 4 bits in layout 'gemv' is not read"),
    "no zero points": (awq, {"zero_point": False}, "AWQ of 4 bits"),
    "sparse": (
        lambda: pack_quantized(4, True),
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        r"of sparse weights \(sparse-24-bitmask\)",
    ),
}


@pytest.mark.parametrize(("make", "said", "message"), UNREAD.values(), ids=UNREAD.keys())
def test_layouts_that_are_not_read_are_named(make, said, message, tmp_path):
    source = make()
    source.quantization |= said
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source.write(tmp_path))


def test_bits_that_the_config_does_not_mean(tmp_path):
    source = gptq(4, 1, False, True)
    source.quantization["bits"] = 8
    with pytest.raises(CheckpointError, match=r"qzeros' has 4 words for 32 outputs, which does not fit 8 bits"):
        open_checkpoint(source.write(tmp_path))


# --- values ----------------------------------------------------------------------------------------------------------


def refused(source: Source, tmp_path, message: str) -> None:
    """Before the work, and by whoever reads the weight all the same."""
    checkpoint = open_checkpoint(source.write(tmp_path))
    for use in (lambda: checkpoint.check_values([]), lambda: checkpoint.read(source.name)):
        with pytest.raises(CheckpointError, match=message):
            use()


def test_gptq_zero_points_that_readers_take_differently(tmp_path):
    source = gptq(4, 1, False, False)
    zeros = numbers(7, 0, 15, 3, 32)
    zeros[1, 2] = 15
    source.tensors[f"{UP}.qzeros"] = packed_rows(zeros, 4)
    refused(source, tmp_path, r"qzeros': zero points of 16 in 4 bits")


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_of_the_other_version_than_it_says(version, tmp_path):
    """Published: zero points of 8 under checkpoint_format gptq. Off by one, every weight is off by its scale."""
    source = gptq(4, version, False, True)
    source.quantization["checkpoint_format"] = "gptq_v2" if version == 1 else "gptq"
    refused(source, tmp_path, r"zero points are not 8, though sym is true; checkpoint_format")


@pytest.mark.parametrize("group", [-1, 3])
def test_gptq_groups_that_are_not_there(group, tmp_path):
    source = gptq(4, 1, True, True)
    source.tensors[f"{UP}.g_idx"][5] = group
    refused(source, tmp_path, r"g_idx' names groups that are not among 3")


def test_codes_that_are_no_number(tmp_path):
    source = fp8_blocks()
    source.tensors[source.name].view(torch.uint8)[3, 4] = 0x7F
    checkpoint = open_checkpoint(source.write(tmp_path))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has values that are not finite"):
        checkpoint.read(source.name)


@EACH_PART
def test_random_bytes_are_refused_or_give_numbers(make, part, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        source = make()
        tensor = source.tensors[part]
        noise = torch.randint(0, 256, (max(1, tensor.nbytes),), dtype=torch.uint8, generator=generator)
        source.tensors[part] = noise.view(tensor.dtype).reshape(tensor.shape)
        with suppress(CheckpointError):
            checkpoint = open_checkpoint(source.write(tmp_path))
            checkpoint.check_values([])
            read = checkpoint.read(source.name)
            assert read.shape == source.weight.shape
            assert read.isfinite().all()


# --- configs that mean nothing ----------------------------------------------------------------------------------------

JUNK = (None, "x", "", -1, 0, 3, 2**70, 1.5, float("nan"), True, [], [1], [0, 0], [-16, 32], ["a", "b"], {}, {"a": 1})


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def with_junk(value: object, path: tuple, junk: object) -> object:
    if not path:
        return junk
    changed = copy.deepcopy(value)
    changed[path[0]] = with_junk(changed[path[0]], path[1:], junk)
    return changed


@EVERY
def test_any_config_is_understood_or_refused(make, tmp_path):
    """No other error, whatever is in its place; and numbers that are read have the shape that was announced."""
    source = make()
    directory = source.write(tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"text_config": {"quantization_config": {}}}
    for path in places(config):
        for junk in JUNK if path else ():
            (directory / "config.json").write_text(json.dumps(with_junk(config, path, junk)))
            with suppress(CheckpointError):
                checkpoint = open_checkpoint(directory)
                checkpoint.check_values([])
                assert checkpoint.read(source.name).shape == checkpoint.tensors[source.name].shape


# --- tools that are known and not read -------------------------------------------------------------------------------


def mlx(quantization: dict) -> Source:
    tensors = {f"{UP}.weight": torch.zeros(32, 8, dtype=torch.uint32)}
    tensors |= {f"{UP}.{name}": torch.zeros(32, 1).bfloat16() for name in ("scales", "biases")}
    return Source(tensors, quantization, torch.zeros(0), config={"quantization": {"group_size": 64, "bits": 4}})


@pytest.mark.parametrize("quantization", [{}, {"group_size": 64, "bits": 4}], ids=["quantization", "both keys"])
def test_mlx_is_refused_by_name(quantization, tmp_path):
    with pytest.raises(CheckpointError, match=r"quantized already \(the weights are MLX's"):
        open_checkpoint(mlx(quantization).write(tmp_path))


@pytest.mark.parametrize("said", [{}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}], ids=["file", "config"])
def test_modelopt_is_refused_by_name(said, tmp_path):
    source = fp8_blocks()
    source.quantization = said
    source.write(tmp_path)
    if not said:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(CheckpointError, match=r"quantized already \(the weights are NVIDIA ModelOpt's"):
        open_checkpoint(tmp_path)


def test_the_file_of_gptq_tools_is_pointed_at(tmp_path):
    source = gptq(4, 1, False, True)
    source.quantization = {}
    (source.write(tmp_path) / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    with pytest.raises(CheckpointError, match=r"quantize_config\.json is not read: put its content into config\.json"):
        open_checkpoint(tmp_path)


# --- what is around them ---------------------------------------------------------------------------------------------


def test_what_says_how_the_source_was_quantized_does_not_reach_the_result(tmp_path):
    """At either place of the config, and in the tools' own files."""
    source = fp8_blocks()
    said, source.quantization = source.quantization, {}
    source.config = {"text_config": {"num_hidden_layers": 1, "quantization_config": said}}
    source.write(tmp_path / "in")
    for name in ("quantize_config.json", "quant_config.json", "generation_config.json"):
        (tmp_path / "in" / name).write_text("{}")
    checkpoint = open_checkpoint(tmp_path / "in")
    assert torch.equal(checkpoint.read(source.name), source.weight)
    assert checkpoint.config["text_config"] == {"num_hidden_layers": 1}
    (tmp_path / "out").mkdir()
    checkpoint.save_side_files(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["generation_config.json"]


@pytest.mark.parametrize("identity", [lambda checkpoint: checkpoint.fingerprint, content_digest])
def test_an_identity_knows_what_the_numbers_mean(identity, tmp_path, monkeypatch):
    """The same tensors in version 1 and 2 of GPTQ are two models."""
    source = gptq(4, 1, False, False)
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "cache"))
    first = identity(open_checkpoint(source.write(tmp_path / "1")))
    assert identity(open_checkpoint(source.write(tmp_path / "copy"))) == first
    source.quantization["checkpoint_format"] = "gptq_v2"
    assert identity(open_checkpoint(source.write(tmp_path / "2"))) != first


def test_tensors_of_plain_models_that_only_look_alike_are_carried(tmp_path):
    """Masks, positions, tables of tokens; scales and biases of norms."""
    plain = {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "embeddings.position_ids": torch.arange(4)[None],
        "layers.0.ffn.gate.tid2eid": torch.zeros(8, 2, dtype=torch.int32),
        "layers.0.norm.scale": torch.ones(4),
        "layers.0.attn.logit_scale": torch.ones(1),
    }
    checkpoint = open_checkpoint(Source(dict(plain), {}, torch.zeros(0)).write(tmp_path))
    assert set(plain) < set(checkpoint.tensors)
