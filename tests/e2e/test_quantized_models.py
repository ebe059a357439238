"""Models as they are published, in small: decoded as transformers decodes them, quantized, loaded, generating."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import _save_tokenizer, edit_config
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import qpalette
from qpalette.evaluate import evaluate, load_model
from qpalette.formats import open_artifact
from qpalette.storage import open_checkpoint
from quantized_sources import fp4_bytes, numbers, packed_rows, scales

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": None,
    "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
BLOCK = 16
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*"]}
PACKED |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}}}
Tensors = dict[str, torch.Tensor]


def in_fp8(tensors: Tensors) -> Tensors:
    """Every linear of a layer, as DeepSeek and MiniMax publish them."""
    result = dict(tensors)
    for name, weight in tensors.items():
        if weight.ndim == 2 and "layers" in name and not name.endswith("gate.weight"):
            rows, columns = weight.shape
            blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            result[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            result[f"{name}_scale_inv"] = scale
    return result


def in_mxfp4(tensors: Tensors) -> Tensors:
    """The experts, as gpt-oss has them."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj")}
    for name in tensors.keys() - result.keys():
        experts, columns, rows = tensors[name].shape
        codes = numbers(len(name), 0, 16, experts, rows, columns)
        result[f"{name}_blocks"] = fp4_bytes(codes).view(experts, rows, columns // 32, 16)
        result[f"{name}_scales"] = numbers(1, 119, 123, experts, rows, columns // 32).to(torch.uint8)
    return result


def in_int4(tensors: Tensors) -> Tensors:
    """The experts, as Kimi-K2-Thinking has them."""
    result = dict(tensors)
    for name, weight in tensors.items():
        if ".experts." in name:
            rows, columns = weight.shape
            del result[name]
            result[f"{name}_packed"] = packed_rows(numbers(columns, 0, 16, rows, columns), 4)
            result[f"{name}_scale"] = scales(rows, columns // 32).bfloat16()
            result[f"{name}_shape"] = torch.tensor([rows, columns])
    return result


def write(directory: Path, model_type: str, encode: Callable[[Tensors], Tensors], said: dict, **sizes: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | sizes)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(directory)
    tensors = encode(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    edit_config(directory, quantization_config=said)
    _save_tokenizer(directory)
    return directory


def gpt_oss(directory: Path) -> Path:
    return write(directory, "gpt_oss", in_mxfp4, {"quant_method": "mxfp4"}, num_local_experts=4)


def deepseek_v3(directory: Path) -> Path:
    return write(directory, "deepseek_v3", in_fp8, FP8, **LATENT)


def kimi_k2(directory: Path) -> Path:
    return write(directory, "deepseek_v3", in_int4, PACKED, **LATENT)


def minimax_m2(directory: Path) -> Path:
    return write(directory, "minimax_m2", in_fp8, FP8, num_local_experts=4)


PUBLISHED = (gpt_oss, deepseek_v3, kimi_k2, minimax_m2)
# What transformers itself decodes without another package.
DEQUANTIZED = {
    gpt_oss: Mxfp4Config(dequantize=True),
    deepseek_v3: FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True),
    minimax_m2: FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("publish", DEQUANTIZED, ids=lambda publish: publish.__name__)
def test_the_reference_is_what_transformers_decodes(publish, tmp_path):
    """What `load`, `eval --reference`, `calibrate` and `tune` compare with, bit for bit."""
    directory = publish(tmp_path / "source")
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=DEQUANTIZED[publish], dtype=torch.bfloat16
    )
    ours, _ = load_model(directory, dtype=torch.bfloat16)
    expected = theirs.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("publish", PUBLISHED, ids=lambda publish: publish.__name__)
def test_quantized_loaded_generating(publish, tmp_path):
    source, out = publish(tmp_path / "source"), tmp_path / "out"
    report = qpalette.quantize(source, out, spec="nuq-4")
    assert any("experts" in linear.name for linear in report.linears)
    # nuq-4 leaves 0.0095 of a Gaussian; codes of a few levels, rotated, are nearly one.
    assert all(0.003 < linear.distortion < 0.03 for linear in report.linears)

    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qpalette"
    assert open_artifact(out).config["model_type"] == config["model_type"]

    model, _ = qpalette.load(out, dtype=torch.float32)
    ids = torch.arange(1, 13)[None]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    reference, _ = load_model(source)
    with torch.inference_mode():
        theirs, ours = reference(ids).logits, model(ids).logits
    assert 0 < (ours - theirs).square().mean() < 0.25 * theirs.square().mean()


def test_calibrated_on_the_decoded_weights(tmp_path):
    """One road: calibration, quantizing and evaluation read the same weights, and know them as one source."""
    source, out = deepseek_v3(tmp_path / "source"), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 128}" for number in range(0, 6000, 7)))
    calibration = qpalette.calibrate(source, tmp_path / "hessians", text, tokens=128, window=32)
    assert calibration.source == open_checkpoint(source).fingerprint
    qpalette.quantize(source, out, spec="nuq-4", calibration=tmp_path / "hessians")
    figures = evaluate(out, source, text, windows=1)
    assert 0 < figures.kl < 0.1
