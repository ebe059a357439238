"""A cache of fixed length, whose memory a captured step may read and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationMixin, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

ATTENTION = ("eager", "sdpa", "grouped")  # that read a cache of fixed length by its mask

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


def writes_keys_out(config: Any) -> bool:
    """Whether a model's attention is one that may write keys and values out for each query of a group, and "grouped"
    stands for: sdpa, of scores without a soft cap."""
    return config._attn_implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is None


class Layer(StaticLayer):
    """A StaticLayer for any attention that reads keys and values, a sliding window's, too.

    Transformers' own layer for a window counts its tokens in Python, and a captured step would keep the count it was
    captured with; here all tokens stay, and the mask says which are read. Its length is one number on the device:
    it can be cut back. Unlike transformers' it does not tell torch.compile that its addresses are static: code that
    was compiled with one cache serves the next.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Memory for `max_cache_len` tokens like these: keys and values [batch, heads, tokens, width]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        shape = (self.batch_size, self.num_heads, self.max_cache_len)
        self.keys = key_states.new_zeros(*shape, self.k_head_dim)
        self.values = value_states.new_zeros(*shape, self.v_head_dim)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True


def holds(config: Any) -> bool:
    """Whether the model's cache is keys and values alone: no state of another kind, no layer without any."""
    kinds = {type(layer) for layer in StaticCache(config=config, max_cache_len=1).layers}
    return kinds <= {StaticLayer, StaticSlidingWindowLayer}


def can_serve(model: Any) -> bool:
    """Whether `model` is a decoder whose forward takes a `TokenCache`, and token, position and mask as any does."""
    return (
        model.can_generate()
        and not model.config.is_encoder_decoder
        and holds(model.config)
        and (_prepares_as_all(model) or _is_short_phi3(model.config))
    )


def _prepares_as_all(model: Any) -> bool:
    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    return all(getattr(type(model), name) is getattr(GenerationMixin, name) for name in names)


def _is_short_phi3(config: Any) -> bool:
    """Phi3 reads its text anew where it grows so long that the rotary embedding changes; a plain one stays."""
    return config.model_type == "phi3" and config.rope_parameters["rope_type"] == "default"


class TokenCache(StaticCache):
    """`length` tokens of a model that `holds` says yes to. It takes its memory at the first tokens, or at once where
    `like` tells their shapes."""

    layers: list[Layer]  # type: ignore[assignment]  # transformers allows more

    def __init__(self, config: Any, length: int, like: TokenCache | None = None) -> None:
        super().__init__(config=config, max_cache_len=length)
        self.config, self.length = config, length
        self.layers = [Layer(length) for _ in self.layers]
        if like is not None:
            self._take_memory(like)

    @property
    def bytes(self) -> int:
        """Of keys and values; 0 before the first tokens."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._with_memory)

    def empty_like(self) -> TokenCache:
        """Another of this shape, with memory."""
        return TokenCache(self.config, self.length, self)

    def begin(self, mask: torch.Tensor | None) -> None:
        """A prompt with this attention mask comes: here it makes no difference."""

    def set_length(self, tokens: int) -> None:
        """The first `tokens` count; what follows is written over."""
        for layer in self.layers:
            layer.cumulative_length.fill_(tokens)

    def clear(self, start: int, end: int) -> None:
        """Zeros from token `start` to `end`: a value that is not finite would spoil sums even where it is masked."""
        for layer in self._with_memory:
            layer.keys[:, :, start:end].zero_()
            layer.values[:, :, start:end].zero_()

    def copy(self, other: TokenCache, tokens: int) -> None:
        """The first `tokens` of the other, which become the length."""
        if not self._with_memory:
            self._take_memory(other)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys[:, :, :tokens].copy_(theirs.keys[:, :, :tokens])
            mine.values[:, :, :tokens].copy_(theirs.values[:, :, :tokens])
        self.set_length(tokens)

    def views(self, row: int, start: int, end: int) -> list[KeysAndValues]:
        """What each layer has of a sequence's tokens, [heads, tokens, width], where it lies."""
        return [(layer.keys[row, :, start:end], layer.values[row, :, start:end]) for layer in self.layers]

    def read(self, row: int, start: int, end: int) -> list[KeysAndValues]:
        """Copies of that."""
        return [(keys.clone(), values.clone()) for keys, values in self.views(row, start, end)]

    def write(self, row: int, start: int, sequence: Sequence[KeysAndValues]) -> None:
        """A sequence's tokens from token `start` on; zeros elsewhere, as in `clear`. The length stays."""
        theirs = [each for both in sequence for each in both]
        mine = [each for both in self.views(row, 0, self.length) for each in both]
        torch._foreach_zero_(mine)
        end = start + sequence[0][0].shape[1]
        torch._foreach_copy_([each[:, start:end] for each in mine], theirs)

    def take_memory(self, batch: int, like: Sequence[KeysAndValues]) -> None:
        """Of so many sequences as `read` gives one of, if there is none yet."""
        for layer, both in zip(self.layers, like, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(*(each[None, :, :0].expand(batch, -1, -1, -1) for each in both))

    def lie_in(self, memory: Sequence[KeysAndValues]) -> None:
        """From now on in the first numbers of `memory`, two rows of numbers for each layer."""
        for layer, (keys, values) in zip(self.layers, memory, strict=True):
            layer.keys = keys[: layer.keys.numel()].view_as(layer.keys)
            layer.values = values[: layer.values.numel()].view_as(layer.values)

    @property
    def _with_memory(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def _take_memory(self, like: TokenCache) -> None:
        for layer, other in zip(self.layers, like.layers, strict=True):
            layer.lazy_initialization(other.keys, other.values)
