"""Queries, keys and values as a model's attention gets them, by transformers' own door for attention functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qpalette.core.errors import UnsupportedError

NAME = "watched"

Watcher = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, query [batch, query heads, tokens, dim], key and value [batch, heads, tokens, dim]) -> key and value."""


@contextmanager
def watched(model: Any, watcher: Watcher) -> Iterator[None]:
    """Every attention of `model` shows `watcher` what it gets, after rotary embeddings and cache, and goes on with the
    keys and values that come back.

    Raises UnsupportedError for a model that does not choose its attention by transformers' interface.
    """
    before = model.config.get_text_config()._attn_implementation
    if before not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedError(f"the attention '{before}' cannot be watched: choose sdpa or eager")

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        key, value = watcher(module.layer_idx, query, key, value)
        return _original(before, module)(module, query, key, value, *args, **options)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[before])
    try:
        model.set_attn_implementation(NAME)
        yield
    except ValueError as error:
        raise UnsupportedError(f"the attention of {model.config.model_type} cannot be watched: {error}") from error
    finally:
        model.set_attn_implementation(before)


def _original(name: str, module: Any) -> Any:
    own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, own)
