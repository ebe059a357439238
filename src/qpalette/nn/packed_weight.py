"""What a packed module shows as its weight: type and shape without a copy, a product without decoding, and everything
else by decoding, for classes whose code reads the weight of a linear or of an expert itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from qpalette.core.errors import UnsupportedError

if TYPE_CHECKING:
    from qpalette.nn.packed_module import PackedModule


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class PackedWeight(Tensor):
    """The matrices of `linears` one above the other, [sum of out_features, in_features]; or, `transposed`, beside each
    other and in_features x ... Its type is that of the activations.

    Raises UnsupportedError when something would write into it.
    """

    _is_hf_initialized = True  # transformers then gives it no random values
    linears: tuple[PackedModule, ...]
    transposed: bool

    @staticmethod
    def __new__(cls, linears: Sequence[PackedModule], transposed: bool = False) -> PackedWeight:
        shape = (sum(linear.record.out_features for linear in linears), linears[0].record.in_features)
        return _wrapped(cls, tuple(reversed(shape)) if transposed else shape, linears[0])

    def __init__(self, linears: Sequence[PackedModule], transposed: bool = False) -> None:
        self.linears, self.transposed = tuple(linears), transposed

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix, rounded once to `dtype`, by default its own."""
        matrix = torch.cat([linear.dequantized_weight() for linear in self.linears]).to(dtype or self.dtype)
        return matrix.T if self.transposed else matrix

    def product(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., sum of out_features]: of the matrices, whichever way they are shown."""
        return torch.cat([linear.multiply(x) for linear in self.linears], dim=-1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], PackedWeight) and not args[1].transposed:
            result, bias = args[1].product(args[0]), kwargs.get("bias", args[2] if len(args) > 2 else None)
            return result if bias is None else result + bias
        if func in _MATMULS and isinstance(args[0], PackedWeight) and args[0].dim() == 2 and not args[0].transposed:
            return args[0].product(args[1].transpose(-1, -2)).transpose(-1, -2)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func._schema.is_mutable:
            raise UnsupportedError("a packed weight cannot be written to: dequantize the model first")
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))

    def __deepcopy__(self, memo: Any) -> PackedWeight:
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)})"


class PackedStack(PackedWeight):
    """Those of all experts, [experts, rows, columns]; one of them is a `PackedWeight`."""

    @staticmethod
    def __new__(cls, experts: Sequence[Sequence[PackedModule]], transposed: bool = False) -> PackedStack:
        shape = (len(experts), *PackedWeight(experts[0], transposed).shape)
        return _wrapped(cls, shape, experts[0][0])

    def __init__(self, experts: Sequence[Sequence[PackedModule]], transposed: bool = False) -> None:
        self.experts, self.transposed = tuple(PackedWeight(linears, transposed) for linears in experts), transposed

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.stack([expert.decoded(dtype) for expert in self.experts])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and (index := _one(args[1])) is not None:
            return args[0].experts[index]
        if func is torch.bmm and isinstance(args[1], PackedStack) and args[1].transposed:
            pairs = zip(args[0], args[1].experts, strict=True)
            return torch.stack([expert.product(rows) for rows, expert in pairs])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _one(index: Any) -> int | None:
    """The number of one expert; None for what picks several."""
    if isinstance(index, Tensor) and index.dim() == 0 and not index.is_meta and index.dtype != torch.bool:
        return int(index)
    return index if type(index) is int else None


def _dense(value: Any) -> Any:
    return value.decoded() if isinstance(value, PackedWeight) else value


def _wrapped(cls: Any, shape: tuple[int, ...], linear: PackedModule) -> Any:
    return Tensor._make_wrapper_subclass(cls, shape, dtype=linear.type_of.dtype, device=linear.qp_codes.device)
