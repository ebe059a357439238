"""Keys and values that are codes until something looks at them."""

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


@dataclass(frozen=True)
class _Layer:
    keys: Stream
    values: Stream
    count: Tensor  # int64 []: how many tokens there are
    starts: Tensor  # int64 [batch]


class CodedStates(Tensor):
    """All keys, or all values, of a layer, [batch, heads, length, dim], as a tensor of their type.

    Torch's attention over both reads codes, where the streams can. Any other function gets them decoded, as they are
    then: so they are good until the layer takes more tokens.
    """

    layer: _Layer
    stream: Stream

    @staticmethod
    def of(keys: Stream, values: Stream, count: Tensor, starts: Tensor) -> tuple[CodedStates, CodedStates]:
        """Of a layer with `count` tokens, int64 [], of sequences that begin at `starts`, int64 [batch]."""
        layer = _Layer(keys, values, count, starts)
        return CodedStates(layer, keys), CodedStates(layer, values)

    @staticmethod
    def __new__(cls, layer: _Layer, stream: Stream) -> CodedStates:
        like = stream.sinks
        shape = (*like.shape[:2], stream.length, like.shape[-1])
        states = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        states.layer, states.stream = layer, stream
        return states

    def decoded(self) -> Tensor:
        """A tensor like any other."""
        return self.stream.read(self.layer.count, self.layer.starts).to(self.stream.sinks.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if func in _OF_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **keywords)
        found = _attended(*args, **keywords) if func is _ATTENTION else None
        if found is not None:
            return found
        return cls.__torch_dispatch__(func, types, args, keywords)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it with and without keywords
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain, named = tree_map_only(CodedStates, CodedStates.decoded, (args, kwargs or {}))
        return func(*plain, **named)


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
    if not alike or attn_mask is None or dropout_p or is_causal or query.ndim != 4:
        return None
    assert isinstance(key, CodedStates)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    layer = key.layer
    return layer.keys.attend(layer.values, query, attn_mask, layer.count, layer.starts, factor)
