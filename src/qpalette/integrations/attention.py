"""Attention for one new token over a static cache, in which queries that share a key are rows of one product.

A static cache brings a mask, and with a mask transformers' sdpa first writes out keys and values once for each query of
a group (`repeat_kv`; newer ones do so while torch.compile traces): for Llama-3.1-8B at 1024 tokens, 4 times 4.7 MB a
layer. Here they are read as they are.
It is registered by transformers' own door: `attn_implementation="grouped"`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qpalette.backends.cuda.attend import attend, attends
from qpalette.core.errors import UnsupportedError
from qpalette.nn.coded_states import READER, CodedPair, CodedStates


def grouped(
    module: Any,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, 1, D], key and value [B, H / G, L, D], mask [B, 1, 1, L] -> [B, 1, H, D]; sdpa for what is else. Key
    and value may be a `CodedPair`, both the same one.

    One launch where the device has clusters of blocks (`backends/cuda/attend.cu`), one call of torch's on a CPU;
    elsewhere two products and a softmax in float32: the first product spreads over the keys, too.

    Raises UnsupportedError for attention sinks, which sdpa would leave out without a word; soft caps it refuses itself.
    """
    if options.get("s_aux") is not None:
        raise UnsupportedError("grouped attention knows no attention sinks: use attn_implementation='eager'")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, CodedStates):
        key = key.layer
    if isinstance(key, CodedPair):
        rows, plain = _rows(query, key.keys.sinks), _is_plain(attention_mask, options)
        found = key.attended(rows, attention_mask, scale) if plain else None
        if found is not None:
            return _heads(found, query), None
        key, value = key.decoded()
    if not _groups(query, key, attention_mask, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    assert attention_mask is not None
    if attends(query, key, value, attention_mask):
        return attend(query, key, value, attention_mask, scale), None
    if query.device.type == "cpu":
        rows = _rows(query, key)
        attended = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scale)
        return _heads(attended, query), None
    scores = _rows(query, key) @ key.transpose(-1, -2) * scale
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    return _heads(scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value, query), None


def register() -> None:
    """Make it known to transformers, by the name "grouped"."""
    AttentionInterface.register(READER, grouped)
    AttentionMaskInterface.register(READER, sdpa_mask)


def _groups(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, options: dict[str, Any]
) -> bool:
    """One new token, several queries to a key, one mask for all heads, and nothing that changes the scores."""
    return query.shape[2] == 1 and query.shape[1] > key.shape[1] and _is_plain(attention_mask, options)


def _is_plain(attention_mask: torch.Tensor | None, options: dict[str, Any]) -> bool:
    return (
        attention_mask is not None
        and attention_mask.shape[1] == 1
        and not options.get("dropout")
        and options.get("position_bias") is None
        and options.get("softcap") is None
    )


def _rows(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    batch, _, _, width = query.shape
    return query.reshape(batch, key.shape[1], -1, width)


def _heads(result: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    batch, heads, _, _ = query.shape
    return result.reshape(batch, 1, heads, result.shape[-1])


register()
