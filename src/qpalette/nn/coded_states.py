"""Keys and values that are codes until something looks at them.

Eagerly they are tensors to whoever gets them (`CodedStates`). Torch.compile cannot trace how such a tensor is made:
there the attention function that knows them gets the layer itself (`CodedPair`), and calls the same operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qpalette.kvcache import Stream

_OF_THE_SHAPE = {
    Tensor.size,
    Tensor.dim,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")),
}
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_ALL = slice(None)
_SPREAD = (_ALL, _ALL, None, _ALL, _ALL)


READER = "grouped"  # the attention function, as transformers names it, that takes a CodedPair for keys and for values


@dataclass(frozen=True)
class CodedPair:
    """All keys and values of a layer; good until it takes more tokens."""

    keys: Stream
    values: Stream
    count: Tensor  # int64 []: how many tokens there are
    starts: Tensor  # int64 [batch]

    def attended(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
        """Attention of `query` [batch, key heads, rows, dim] to them, of its shape but for the values' width; None:
        it has to see numbers."""
        if mask is None:
            return None
        return self.keys.attend(self.values, query, mask, self.count, self.starts, scale)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """[batch, key heads, length, dim] each, in the model's type."""
        return self._dense(self.keys), self._dense(self.values)

    def _dense(self, stream: Stream) -> Tensor:
        return stream.read(self.count, self.starts).to(stream.sinks.dtype)


class CodedStates(Tensor):
    """All keys, or all values, of a layer, [batch, heads, length, dim], as a tensor of their type.

    Torch's attention over both reads codes, where the streams can: also where heads were repeated for the queries that
    share them, as transformers' `repeat_kv` does ahead of it. Any other function gets them decoded, as they are then:
    so they are good until the layer takes more tokens.
    """

    layer: CodedPair
    stream: Stream
    repeats: int  # of each head
    is_spread: bool  # the repeats are a dimension of their own, behind the heads

    @staticmethod
    def of(layer: CodedPair) -> tuple[CodedStates, CodedStates]:
        """Its keys, and its values."""
        return CodedStates(layer, layer.keys), CodedStates(layer, layer.values)

    @staticmethod
    def __new__(cls, layer: CodedPair, stream: Stream, repeats: int = 1, is_spread: bool = False) -> CodedStates:
        like = stream.sinks
        batch, heads = like.shape[:2]
        first = (batch, heads, repeats) if is_spread else (batch, heads * repeats)
        shape = (*first, stream.length, like.shape[-1])
        states = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        states.layer, states.stream, states.repeats, states.is_spread = layer, stream, repeats, is_spread
        return states

    def decoded(self) -> Tensor:
        """A tensor like any other."""
        dense = self.layer._dense(self.stream)
        if not self.is_spread and self.repeats == 1:
            return dense
        spread = dense[:, :, None].expand(-1, -1, self.repeats, -1, -1)
        return spread if self.is_spread else spread.flatten(1, 2)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if func in _OF_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **keywords)
        found: Any = _attended(*args, **keywords) if func is _ATTENTION else _repeated(func, args)
        if found is not None:
            return found
        return cls.__torch_dispatch__(func, types, args, keywords)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it with and without keywords
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain, named = tree_map_only(CodedStates, CodedStates.decoded, (args, kwargs or {}))
        return func(*plain, **named)


def _repeated(func: Any, args: tuple[Any, ...]) -> CodedStates | None:
    """A step of `repeat_kv`: states[:, :, None, :, :], .expand(.., n, ..), .reshape(..). None: another call."""
    states, *rest = args
    if not isinstance(states, CodedStates):
        return None
    if func is Tensor.__getitem__ and not states.is_spread and states.repeats == 1:
        (index,) = rest
        plain = isinstance(index, tuple) and all(part is None or isinstance(part, slice) for part in index)
        return CodedStates(states.layer, states.stream, 1, True) if plain and index == _SPREAD else None
    if not (states.is_spread and len(rest) == len(states.shape) - (func is Tensor.reshape)):
        return None
    if func is Tensor.expand and states.repeats == 1 and rest[2] > 0:
        wanted = CodedStates(states.layer, states.stream, rest[2], True)
    elif func is Tensor.reshape:
        wanted = CodedStates(states.layer, states.stream, states.repeats)
    else:
        return None
    return wanted if tuple(rest) == wanted.shape else None


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """What torch's function of these arguments gives, of codes; None where it has to see numbers."""
    alike = isinstance(key, CodedStates) and isinstance(value, CodedStates) and type(query) is Tensor
    if not alike or dropout_p or is_causal or query.ndim != 4:
        return None
    assert isinstance(key, CodedStates)
    assert isinstance(value, CodedStates)
    if key.repeats != value.repeats or key.is_spread or value.is_spread:
        return None
    factor, (batch, heads, tokens, dim) = query.shape[-1] ** -0.5 if scale is None else scale, query.shape
    if key.repeats == 1:
        return key.layer.attended(query, attn_mask, factor)
    if tokens > 1 or heads != key.shape[1] or attn_mask is None or attn_mask.ndim != 4 or attn_mask.shape[1] > 1:
        return None
    found = key.layer.attended(query.reshape(batch, -1, key.repeats, dim), attn_mask, factor)
    return None if found is None else found.reshape(batch, heads, 1, found.shape[-1])
