"""Random models of a few thousand weights, packed by the plain definitions: what the integration is tested on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles, to_tiles
from qpalette.core.records import LinearRecord
from qpalette.rotate import pack_signs, random_signs, rotate_weight, rotation_for, unrotate_weight
from qpalette.runtime import select

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Packed(NamedTuple):
    record: LinearRecord
    tensors: dict[str, torch.Tensor]  # suffix -> stored tensor
    weight: torch.Tensor  # what the packed tensors mean, float32


def build(kind: str, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = SIZES | sizes
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=kind == "llama-bias"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)  # logits far apart, so that greedy tokens mean something
    return model.eval()


def pack(weight: torch.Tensor, name: str, spec: str, seed: int = 0, rotate: str = "full") -> Packed:
    out_features, in_features = weight.shape
    rotation, signs = rotation_for(in_features, rotate), random_signs(in_features, seed, name)
    rotated = rotate_weight(weight, rotation, signs)
    scales = rotated.square().mean(1).sqrt().half()
    tiles = to_tiles(rotated / scales.float()[:, None])
    codes = select("encode", spec, torch.device("cpu")).encode(spec, tiles.flatten(0, 1))
    decoded = from_tiles(parse_spec(spec).decode(codes).reshape(tiles.shape), out_features, in_features)
    tensors = {
        "qp_codes": codes.reshape(*tiles.shape[:2], -1),
        "qp_scales": scales.view(torch.int16),
        "qp_signs": pack_signs(signs),
    }
    record = LinearRecord(spec, out_features, in_features, rotation.name, seed)
    return Packed(record, tensors, unrotate_weight(decoded * scales.float()[:, None], rotation, signs))


def save_pair(
    directory: Path, kind: str, spec: str | Callable[[str], str | None] = "nuq-4", rotate: str = "full", **sizes: int
) -> tuple[Path, Path]:
    """The same model twice: packed, and as an ordinary float32 checkpoint of the weights that the codes mean.

    `spec` for all linears but the head, or a function of the linear's name, whose None leaves that one as it is.
    """
    packed_directory, plain_directory = directory / "packed", directory / "plain"
    model = build(kind, **sizes)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    spec_of = spec if callable(spec) else lambda name: None if name == "lm_head" else spec
    specs = {name: chosen for name in linears if (chosen := spec_of(name)) is not None}
    packed = {name: pack(linears[name].weight.detach(), name, specs[name], rotate=rotate) for name in specs}
    for name, item in packed.items():
        linears[name].weight.data = item.weight
    model.save_pretrained(plain_directory)
    model.config.save_pretrained(packed_directory)
    _save_tokenizer(packed_directory)
    carried = load_file(plain_directory / "model.safetensors")
    tensors = {name: tensor for name, tensor in carried.items() if name.removesuffix(".weight") not in packed}
    tensors |= {f"{name}.{suffix}": tensor for name, item in packed.items() for suffix, tensor in item.tensors.items()}
    save_file(tensors, packed_directory / "model.safetensors", {"format": "pt"})
    edit_config(packed_directory, quantization_config=quantization_config(packed))
    return packed_directory, plain_directory


def quantization_config(packed: dict[str, Packed]) -> dict:
    linears = {
        name: {
            "spec": record.spec,
            "shape": [record.out_features, record.in_features],
            "rotation": record.rotation,
            "seed": record.seed,
        }
        for name, (record, _, _) in packed.items()
    }
    return {
        "quant_method": "qpalette",
        "format_version": 2,
        "linears": linears,
        "provenance": {"source": "random"},
        "modules_to_not_convert": ["lm_head"],
    }


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _save_tokenizer(directory: Path) -> None:
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
