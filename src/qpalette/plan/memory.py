"""What a model needs on a device besides its weights: the key-value cache and the activations."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from qpalette.core.errors import InputError
from qpalette.kvcache import bucket
from qpalette.runtime.decoded import BLOCK_ROWS, PIECE, STRIP

ELEMENT_BYTES = 2  # float16 or bfloat16
FLOAT_BYTES = 4
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")  # layers that keep keys and values
PROMPT_TOKENS = 2048  # of each sequence that are in flight together; servers cut longer prompts
LIVE_STREAMS = 4  # copies of the hidden state alive at once: residual, normalised, rotated, output


def device_bytes(config: Mapping[str, Any], context: int, batch: int) -> tuple[int, int]:
    """(key-value cache, activations) in bytes for `batch` sequences of `context` tokens, from a Hugging Face config.

    The cache is what `generate` takes: keys and values in 16 bits, of latent attention the latents, of a length that
    few contexts share (`kvcache.bucket`). Layers with a sliding window keep all tokens, too, so that it can be cut
    back; layers without attention keep none. Activations are an estimate: a prompt of at most 2048 tokens per
    sequence in flight, the largest layer's intermediate, and one position's logits in float32 per sequence; and what
    a processor decodes of a matrix at a time, and multiplies it with.

    Raises InputError when a number is below 1 or the config lacks a size.
    """
    if context < 1 or batch < 1:
        raise InputError(f"context and batch must be at least 1, got {context} and {batch}")
    text = config.get("text_config") or config
    try:
        activations = batch * _activations_per_sequence(text, context) + _decoded(text, batch * context)
        return batch * _cache_per_sequence(text, context), activations
    except KeyError as error:
        raise InputError(f"the model's config has no {error}: its memory cannot be counted") from error


def _cache_per_sequence(text: Mapping[str, Any], context: int) -> int:
    if text.get("kv_lora_rank"):
        per_token = text["kv_lora_rank"] + text["qk_rope_head_dim"]
    else:
        per_token = 2 * prod(cached_heads(text))
    kinds = text.get("layer_types") or ["full_attention"] * text["num_hidden_layers"]
    layers = sum(kind in ATTENTION for kind in kinds)
    return ELEMENT_BYTES * per_token * layers * bucket(context, text.get("max_position_embeddings"))


def cached_heads(text: Mapping[str, Any]) -> tuple[int, int]:
    """(heads, numbers of each) of a layer's keys, and of its values. Raises KeyError."""
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    return heads, text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def _activations_per_sequence(text: Mapping[str, Any], context: int) -> int:
    hidden, intermediate = _widths(text)
    streams = LIVE_STREAMS * hidden + 3 * intermediate
    return ELEMENT_BYTES * streams * min(context, PROMPT_TOKENS) + FLOAT_BYTES * text["vocab_size"]


def _decoded(text: Mapping[str, Any], tokens: int) -> int:
    """Weights, the tokens that they are multiplied with, and the products, in float32."""
    hidden, intermediate = _widths(text)
    weights = min(hidden * intermediate, max(STRIP, BLOCK_ROWS * intermediate))
    return FLOAT_BYTES * (weights + min(tokens, PIECE) * (hidden + intermediate))


def _widths(text: Mapping[str, Any]) -> tuple[int, int]:
    hidden = text["hidden_size"]
    return hidden, max(text.get("intermediate_size") or 0, text.get("moe_intermediate_size") or 0, hidden)
