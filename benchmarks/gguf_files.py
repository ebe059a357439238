"""GGUF files of 16-bit floats for llama.cpp's tools: of a random Llama, and of a checkpoint that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter
from transformers import AutoConfig

from qpalette.evaluate import load_model

REPEATED = 16  # rows of a random matrix that are its first ones again: quantizing takes the same time otherwise
ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}


def write_random(file: Path, sizes: dict[str, Any]) -> None:
    """A Llama of `sizes`, fields of its config, N(0, 0.02)."""
    random = np.random.default_rng(0)
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    narrow = hidden // heads * sizes["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        few = random.standard_normal((rows // REPEATED, columns), dtype=np.float32)
        return np.tile((0.02 * few).astype(np.float16), (REPEATED, 1))

    tensors = {"token_embd": matrix(sizes["vocab_size"], hidden), "output_norm": np.ones(hidden, np.float32)}
    shapes = {"attn_q": (hidden, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    shapes |= {"ffn_down": (hidden, inner)}
    for layer in range(sizes["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}"] = np.ones(hidden, np.float32)
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}"] = matrix(*shape)
    _write(file, AutoConfig.for_model("llama", **sizes), {f"{name}.weight": each for name, each in tensors.items()})


def write_checkpoint(directory: Path, file: Path) -> None:
    """A model of transformers, without its tokenizer."""
    model = load_model(directory)[0]
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _rotary_pairs(values, config.hidden_size // config.num_attention_heads)
        kind = torch.float16 if values.ndim > 1 else torch.float32
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values.to(kind).numpy()
    _write(file, config, tensors)


def _rotary_pairs(weight: torch.Tensor, width: int) -> torch.Tensor:
    """As llama.cpp's rope wants a Llama's heads: the two numbers that turn together side by side."""
    return weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _write(file: Path, config: Any, tensors: dict[str, np.ndarray]) -> None:
    writer = GGUFWriter(file, config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
