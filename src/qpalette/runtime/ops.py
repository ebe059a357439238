"""The torch operators that a quantized model calls, defined once for every backend: with their gradients, and traceable
by torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from qpalette.core.errors import InputError, UnsupportedError
from qpalette.rotate import Rotation, diagonal_of
from qpalette.runtime.contract import TILES, Backend, PackedLinear
from qpalette.runtime.dispatch import backends, select
from qpalette.runtime.door import check_packed, check_vectors
from qpalette.runtime.kept import kept

Tensors = list[torch.Tensor]

LIBRARY = torch.library.Library("qpalette", "DEF")
# `group` says which products of one graph may run as one launch; it does not change the result.
LIBRARY.define(
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor diagonal, str spec, str rotation, str layout,"
    " int out_features, int in_features, str group) -> Tensor"
)
LIBRARY.define(
    "linears(Tensor x, Tensor[] codes, Tensor[] scales, Tensor diagonal, str[] specs, str rotation, str layout,"
    " int[] out_features, int in_features) -> Tensor"
)
LIBRARY.define(
    "linear_transposed(Tensor y, Tensor codes, Tensor scales, Tensor diagonal, str spec, str rotation, str layout,"
    " int out_features, int in_features) -> Tensor"
)


@lru_cache(maxsize=1024)
def _owner_of(layout: str, spec: str, device: torch.device) -> Backend:
    owners = [backend for backend in backends().values() if backend.layout == layout]
    if not owners or not owners[0].supports("linear", spec, device).ok:
        raise UnsupportedError(f"codes laid out for '{layout}' cannot run on {device}: load the model there")
    return owners[0]


def backend_for(layout: str, spec: str, device: torch.device) -> Backend:
    """The backend that runs codes stored in `layout`: its owner, or the best one for the stored layout.

    Raises UnsupportedError with the reasons when there is none.
    """
    return select("linear", spec, device) if layout == TILES else _owner_of(layout, spec, device)


def packed_linear(x: torch.Tensor, packed: PackedLinear, group: str = "") -> torch.Tensor:
    """W x for x [..., K] and a packed W [M, K]: [..., M], in x's dtype. Differentiable in x; where `packed.scales` or
    `packed.diagonal` is a floating tensor, of shape [M] or [K], in that one, too.

    Raises InputError when x or the packed matrix is not what the other needs (`door.py`), and UnsupportedError when no
    backend runs it.
    """
    if packed.scales.is_floating_point() or packed.diagonal.is_floating_point():
        return _tuned(x, packed)
    if goes_straight(x):
        return _run(x, [packed])
    operands = (packed.codes, packed.scales, packed.diagonal, packed.spec, packed.rotation, packed.layout)
    return torch.ops.qpalette.linear(x, *operands, packed.out_features, packed.in_features, group)


def packed_linears(x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
    """`packed_linear` of several matrices that share diagonal, rotation and layout, side by side: [..., sum of M].

    A backend may serve them with one rotation and one launch. Raises as `packed_linear`.
    """
    if goes_straight(x):
        return _run(x, members)
    first = members[0]
    return torch.ops.qpalette.linears(
        x,
        [member.codes for member in members],
        [member.scales for member in members],
        first.diagonal,
        [member.spec for member in members],
        first.rotation,
        first.layout,
        [member.out_features for member in members],
        first.in_features,
    )


class PreparedLinears:
    """Matrices that share diagonal, rotation and layout, checked once, and what their backend prepares for them.

    A call without gradients, in eager mode, goes straight to the backend, past torch's dispatcher: its cost, and that
    of making a launch anew, counts when a model makes several hundred small products per token.

    Raises InputError when the matrices do not fit together or one is not what its sizes say, and UnsupportedError when
    no backend runs them.
    """

    def __init__(self, members: Sequence[PackedLinear], group: str = "") -> None:
        backend = _checked_backend(members)
        self.members, self.group = tuple(members), group
        self._inputs, self._device = members[0].in_features, members[0].codes.device
        self._product = backend.product(self.members)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [..., K] -> [..., M] for each matrix, of x's dtype. Raises InputError for an x that does not fit."""
        if goes_straight(x):
            check_vectors(x, self._inputs, self._device)
            return self._product(x)
        return [packed_linear(x, member, self.group) for member in self.members]


def goes_straight(x: torch.Tensor) -> bool:
    # A tensor with the negative bit (an imaginary part of a conjugate) has other values than its memory. Who watches
    # the operators, by a dispatch mode, is shown these, too.
    plain = type(x) is torch.Tensor and not x.is_meta and not torch.compiler.is_compiling() and not x.is_neg()
    unseen = plain and torch._C._len_torch_dispatch_stack() == 0
    return unseen and not (x.requires_grad and torch.is_grad_enabled())


def _run(x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
    first = members[0]
    check_vectors(x, first.in_features, first.codes.device)
    backend = _checked_backend(members)
    rows = x.reshape(-1, first.in_features)
    stays = kept()
    product = None if stays is None or len(members) > 1 else stays.product(first, backend)
    if product is not None:
        (result,) = product(rows)
    else:
        result = backend.linear(rows, first) if len(members) == 1 else backend.linears(rows, members)
    return result.reshape(*x.shape[:-1], result.shape[-1])


def _checked_backend(members: Sequence[PackedLinear]) -> Backend:
    first = members[0]
    for member in members:
        check_packed(member)
        if (member.layout, member.rotation, member.in_features) != (first.layout, first.rotation, first.in_features):
            raise InputError("matrices of one launch have one rotation, one number of inputs and one layout")
    return backend_for(first.layout, first.spec, first.codes.device)


def _tuned(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """With scales or diagonal that are still being fitted: the product with neither, in float32, between the two."""
    scales, diagonal, stays = packed.scales, packed.diagonal, kept()
    work = x.float() * diagonal if diagonal.is_floating_point() else x.float()
    product = packed_linear(work, _inner(packed) if stays is None else stays.inner(packed, _inner))
    return (product * scales if scales.is_floating_point() else product).to(x.dtype)


def _inner(packed: PackedLinear) -> PackedLinear:
    """Without what is fitted: signs of +1, scales of 1."""
    inner, device = packed, packed.codes.device
    if packed.diagonal.is_floating_point():
        no_signs = torch.zeros(-(-packed.in_features // 8), dtype=torch.uint8, device=device)
        inner = inner.with_(diagonal=no_signs)
    if packed.scales.is_floating_point():
        ones = torch.ones_like(packed.scales, dtype=torch.float16, requires_grad=False)
        inner = inner.with_(scales=ones.view(torch.int16))
    return inner


@torch.library.impl(LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, diagonal: torch.Tensor, *rest: Any
) -> torch.Tensor:
    spec, rotation, layout, rows, columns, _ = rest
    return _run(x, [PackedLinear(codes, scales, diagonal, spec, rotation, rows, columns, layout)])


@torch.library.impl(LIBRARY, "linears", "CompositeExplicitAutograd")
def _linears(x: torch.Tensor, codes: Tensors, scales: Tensors, diagonal: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _run(x, _members(codes, scales, diagonal, *rest))


def _members(
    codes: Tensors,
    scales: Tensors,
    diagonal: torch.Tensor,
    specs: list[str],
    rotation: str,
    layout: str,
    out_features: list[int],
    in_features: int,
) -> list[PackedLinear]:
    return [
        PackedLinear(words, row_scales, diagonal, spec, rotation, rows, in_features, layout)
        for words, row_scales, spec, rows in zip(codes, scales, specs, out_features, strict=True)
    ]


@torch.library.impl(LIBRARY, "linear_transposed", "CompositeExplicitAutograd")
def _linear_transposed(
    y: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, diagonal: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """W^T y = diag(d) Q^T W'^T y for y [..., M]: [..., K], in y's dtype; W' is decoded for the moment."""
    spec, rotation, layout, rows, columns = rest
    packed = PackedLinear(codes, scales, diagonal, spec, rotation, rows, columns, layout)
    check_vectors(y, rows, codes.device)
    check_packed(packed)
    backend, stays = backend_for(layout, spec, y.device), kept()
    weight = backend.rotated_weight(packed) if stays is None else stays.rotated_weight(packed, backend)
    product = (y.reshape(-1, rows) @ weight.to(y.dtype)).to(torch.promote_types(y.dtype, torch.float32))
    result = Rotation.parse(rotation, columns).inverse(product) * diagonal_of(diagonal, columns)
    return result.to(y.dtype).reshape(*y.shape[:-1], columns)


@torch.library.register_fake("qpalette::linear", lib=LIBRARY)
def _linear_shape(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rest[-3])


@torch.library.register_fake("qpalette::linears", lib=LIBRARY)
def _linears_shape(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(rest[-2]))


@torch.library.register_fake("qpalette::linear_transposed", lib=LIBRARY)
def _linear_transposed_shape(y: torch.Tensor, *rest: Any) -> torch.Tensor:
    return y.new_empty(*y.shape[:-1], rest[-1])


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.operands = inputs[1:]


def _linear_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return torch.ops.qpalette.linear_transposed(gradient, *ctx.operands[:-1]), *(None for _ in ctx.operands)


def _linear_transposed_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return torch.ops.qpalette.linear(gradient, *ctx.operands, ""), *(None for _ in ctx.operands)


def _linears_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    codes, scales, diagonal, specs, rotation, layout, out_features, in_features = ctx.operands
    parts = gradient.split(out_features, dim=-1)
    shares = [
        torch.ops.qpalette.linear_transposed(part, words, rows, diagonal, spec, rotation, layout, size, in_features)
        for part, words, rows, spec, size in zip(parts, codes, scales, specs, out_features, strict=True)
    ]
    none = [[None] * len(codes), [None] * len(scales), *(None for _ in ctx.operands[2:])]
    return torch.stack(shares).sum(0), *none


for _name, _backward in (
    ("linear", _linear_backward),
    ("linears", _linears_backward),
    ("linear_transposed", _linear_transposed_backward),
):
    torch.library.register_autograd(f"qpalette::{_name}", _backward, setup_context=_keep_operands, lib=LIBRARY)
