"""A packed checkpoint in transformers: the same model as its dequantized weights, through every documented door."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import VOCABULARY, save_pair
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import qpalette
from qpalette.core.errors import UnsupportedError
from qpalette.integrations.transformers import QPaletteConfig, QPaletteQuantizer, register
from qpalette.nn import QuantLinear

KINDS = {"llama": "nuq-4", "llama-bias": "nuq-4", "qwen2": "tcq-2-L12"}
IDS = torch.arange(1, 13)[None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    return {kind: save_pair(tmp_path_factory.mktemp(kind), kind, spec) for kind, spec in KINDS.items()}


@pytest.fixture(scope="module")
def packed(pairs) -> Path:
    return pairs["llama-bias"][0]


def load(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def packed_layers(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def tolerance(model: nn.Module, wanted: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """First-order bound of the rounding along the path: each product of K terms adds K roundings of the type."""
    return torch.finfo(dtype).eps * sum(layer.in_features for layer in packed_layers(model)) * float(wanted.abs().max())


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two checkpoints, sharded or not, hold the same tensors, byte for byte."""
    stored = [
        {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for path in (one, other)
    ]
    views = [{name: (t.dtype, t.shape, t.contiguous().view(torch.uint8)) for name, t in s.items()} for s in stored]
    return views[0].keys() == views[1].keys() and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in ((views[0][name], views[1][name]) for name in views[0])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantized_weights(pairs, kind):
    packed, plain = pairs[kind]
    model, wanted = load(packed), logits(load(plain))
    assert len(packed_layers(model)) == 14
    assert all(layer.prepared for layer in packed_layers(model))
    assert (logits(model) - wanted).abs().max() <= tolerance(model, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loads_in_any_type(packed, dtype):
    model, exact = load(packed, dtype=dtype), logits(load(packed, dtype=torch.float32))
    stored = load_file(packed / "model.safetensors")
    assert model.dtype == dtype
    for name, tensor in model.state_dict().items():
        if "qp_" in name:
            assert torch.equal(tensor, stored[name])
        else:
            assert tensor.dtype == dtype
    result = logits(model)
    assert result.dtype == dtype
    assert (result.float() - exact).abs().max() <= tolerance(model, exact, dtype)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(packed, device_map):
    model = load(packed, device_map=device_map)
    assert all(layer.prepared and layer.qp_codes.device == model.device for layer in packed_layers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_reload_is_bit_exact(pairs, kind, tmp_path):
    packed, _ = pairs[kind]
    model = load(packed)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert same_bytes(packed, tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (packed, tmp_path))
    assert before["quantization_config"] == after["quantization_config"]
    assert torch.equal(logits(load(tmp_path)), wanted)


def test_sharded_save_and_reload(packed, tmp_path):
    load(packed).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same_bytes(packed, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(load(packed)))


def test_a_base_model_loads_and_saves(packed, tmp_path):
    base = AutoModel.from_pretrained(packed)
    assert len(packed_layers(base)) == 14
    base.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(IDS).last_hidden_state, base(IDS).last_hidden_state)
    assert torch.equal(logits(load(tmp_path)), logits(load(packed)))


def test_config_round_trip(packed):
    stored = json.loads((packed / "config.json").read_text())["quantization_config"]
    config = QPaletteConfig.from_dict(stored)
    assert config.to_dict() == stored
    assert json.loads(config.to_json_string()) == stored
    assert config.records["model.layers.0.mlp.down_proj"].in_features == 96
    loaded = load(packed).config
    assert loaded.quantization_config.to_dict() == stored
    assert json.loads(loaded.to_json_string())["quantization_config"] == stored


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_both_caches(pairs, kind):
    packed, plain = pairs[kind]
    model = load(packed)
    options = {"max_new_tokens": 12, "do_sample": False}
    dynamic = model.generate(IDS, **options)
    static = model.generate(IDS, cache_implementation="static", **options)
    assert torch.equal(dynamic, static)
    assert torch.equal(dynamic, load(plain).generate(IDS, **options))


def test_forward_compiles_into_one_graph(packed):
    model = load(packed)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        result = compiled(IDS).logits
    assert (result - logits(model)).abs().max() <= tolerance(model, result)


def test_generate_compiles_with_a_static_cache(packed):
    model = load(packed)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False}
    compiled = model.generate(IDS, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(compiled, model.generate(IDS, **options))


def test_tied_embeddings_stay_tied(packed):
    model = load(packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, nn.Linear)


def test_parameter_count_leaves_out_packed_weights(pairs):
    model, plain = load(pairs["llama"][0]), load(pairs["llama"][1])
    packed_weights = sum(layer.out_features * layer.in_features for layer in packed_layers(model))
    assert model.num_parameters() + packed_weights == plain.num_parameters()


def test_half_and_float_are_refused_by_transformers(packed):
    model = load(packed)
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()


def test_a_cast_leaves_packed_tensors_alone(packed, tmp_path):
    model = load(packed).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored, saved = (load_file(path / "model.safetensors") for path in (packed, tmp_path))
    for name, tensor in stored.items():
        assert torch.equal(saved[name], tensor if "qp_" in name else tensor.bfloat16())


def test_the_argument_is_ignored_and_the_variable_counts(packed, monkeypatch):
    argument = QPaletteConfig.from_dict(json.loads((packed / "config.json").read_text())["quantization_config"])
    argument.provenance = {"source": "the argument"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(packed, quantization_config=argument)
    assert any("quantization_config" in str(warning.message) for warning in caught)
    assert model.config.quantization_config.provenance == {"source": "random"}
    assert {layer.layout for layer in packed_layers(model)} == {"cpu-lanes"}
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    plain = load(packed)
    assert {layer.layout for layer in packed_layers(plain)} == {"tiles"}
    wanted = logits(model)
    assert (logits(plain) - wanted).abs().max() <= tolerance(model, wanted)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantize_gives_an_ordinary_model(pairs, dtype, tmp_path):
    packed, plain = pairs["llama-bias"]
    model = load(packed).dequantize(dtype=dtype)
    assert not packed_layers(model)
    assert not hasattr(model.config, "quantization_config")
    wanted = load(plain, dtype=dtype or torch.float32)
    assert torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(wanted))


def test_dequantize_after_saving(packed, tmp_path):
    model = load(packed)
    model.save_pretrained(tmp_path)  # transformers turns config.dtype into a word here
    assert model.dequantize().model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_registering_again_changes_nothing():
    register()
    register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["qpalette"] is QPaletteConfig
    assert AUTO_QUANTIZER_MAPPING["qpalette"] is QPaletteQuantizer


def test_what_the_quantizer_promises(packed):
    quantizer = load(packed).hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_compileable
    assert quantizer.is_trainable


def test_a_copy_is_independent(packed):
    model = load(packed)
    wanted = logits(model)
    twin = copy.deepcopy(model)
    for layer in packed_layers(model):
        layer.qp_codes.zero_()
    assert torch.equal(logits(twin), wanted)


def test_load_gives_model_and_tokenizer(packed):
    model, tokenizer = qpalette.load(packed, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    assert ids.tolist() == [[5, 6, 7]]
    assert model(ids).logits.shape == (1, 3, VOCABULARY)


def test_quantize_then_load(pairs, tmp_path):
    """The whole product: an ordinary directory in, a packed one out, loaded as anyone would."""
    plain = pairs["qwen2"][1]
    load(plain).save_pretrained(tmp_path / "source")
    qpalette.quantize(tmp_path / "source", tmp_path / "out", spec="nuq-8")
    model, original = load(tmp_path / "out"), logits(load(plain))
    assert len(packed_layers(model)) == 14
    result = logits(model)
    assert nn.functional.cosine_similarity(result, original, dim=-1).min() > 0.99
    ordinary = logits(model.dequantize())
    assert (result - ordinary).abs().max() <= tolerance(load(tmp_path / "out"), ordinary)


def test_load_with_one_backend(packed, monkeypatch):
    monkeypatch.setenv("QPALETTE_BACKEND", "cpu")  # what `load` sets is undone after the test
    model, _ = qpalette.load(packed, backend="ref", device_map="cpu")
    assert {layer.layout for layer in packed_layers(model)} == {"tiles"}
    with pytest.raises(UnsupportedError, match="abacus"):
        qpalette.load(packed, backend="abacus")
