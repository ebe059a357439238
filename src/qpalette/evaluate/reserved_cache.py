"""A key-value cache with memory for all the tokens that will come: none of them is copied when another comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from qpalette.core.errors import UnsupportedError

CACHES = ("past_key_values", "cache_params")  # what classes call theirs; RWKV's "state" is of one sequence alone


def cache_of(output: Mapping[str, Any]) -> tuple[str, Any]:
    """What a model hands from step to step, after the name that it takes it by. Raises UnsupportedError."""
    for name in CACHES:
        if output.get(name) is not None:
            return name, output[name]
    raise UnsupportedError(
        f"the model has no cache to write windows side by side with ({type(output).__name__}): give a text (--text)"
    )


def reserve(cache: Any, tokens: int) -> None:
    """The layers of `cache`, as a model has made it, that keep all keys and values get memory for `tokens` of them.

    Layers of other kinds, such as sliding windows and recurrent states, stay as they are, and so does what is no
    `transformers.Cache`. More tokens are kept, too, as transformers' own layer keeps them.
    """
    layers = getattr(cache, "layers", [])
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[place] = ReservedLayer(layer, tokens)


def bytes_of(cache: Any, tokens: int) -> int:
    """Of the keys and values of `tokens` tokens in a cache like this one, which has read some; 0 for what is no
    `transformers.Cache`. States that do not grow are left out."""
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
    return sum(
        (layer.keys.nbytes + layer.values.nbytes)
        * min(tokens, getattr(layer, "sliding_window", tokens))
        // layer.keys.shape[-2]
        for layer in layers
    )


class ReservedLayer(DynamicLayer):
    """transformers' layer, whose keys and values [batch, heads, tokens, width] are the first part of longer memory.

    transformers makes both anew at every token, which of SmolLM2's step of 36 windows is a fifth.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self._memory = _Memory(tokens), _Memory(tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers': all keys and values, the new ones at their end."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._memory
        self.keys, self.values = keys.append(self.keys, key_states), values.append(self.values, value_states)
        return self.keys, self.values


class _Memory:
    """Of `tokens` tokens, whose first ones are `held`, what was returned last."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.all = self.held = torch.empty(0)

    def append(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """[..., tokens, width]: `new` after `held`, which another may have cut or chosen from."""
        start, end = held.shape[-2], held.shape[-2] + new.shape[-2]
        if held is not self.held or end > self.all.shape[-2]:
            self.all = new.new_empty(*new.shape[:-2], max(self.tokens, end), new.shape[-1])
            self.all.narrow(-2, 0, start).copy_(held)
        self.all.narrow(-2, start, end - start).copy_(new)
        self.held = self.all.narrow(-2, 0, end)
        return self.held
