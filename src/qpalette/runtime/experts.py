"""The experts of a layer as one torch operator, for every number of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qpalette.core.errors import InputError
from qpalette.runtime.contract import Backend, PackedExperts, PackedLinear, in_runs
from qpalette.runtime.door import check_packed, check_routes, check_vectors
from qpalette.runtime.gate import Gate
from qpalette.runtime.ops import LIBRARY, Tensors, backend_for, goes_straight, packed_linear

# Matrices come expert by expert, the last of each behind its first ones; after them, the fields of a `Gate`.
_TABLES = (
    "Tensor[] codes, Tensor[] scales, Tensor[] diagonals, str[] specs, str[] rotations, int[] rows, int[] columns,"
    " str layout, int experts, Tensor? first_bias, Tensor? last_bias, str function, bool gated, bool interleaved,"
    " float? limit, float alpha, float offset"
)
LIBRARY.define(f"experts(Tensor x, Tensor index, Tensor weights, {_TABLES}) -> Tensor")
LIBRARY.define(f"experts_backward(Tensor gradient, Tensor x, Tensor index, Tensor weights, {_TABLES}) -> Tensor[]")


def packed_experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """y[n] = the sum over j of weights[n, j] E(x[n]), E the expert index[n, j]: [N, K], in x's dtype.

    x float [N, K], N from 0 on; index integer [N, k], where what is no expert's number stands for none; weights float
    [N, k]. Differentiable in x, weights and biases. Under torch.compile a gate that is no `Gate` breaks the graph.
    Raises as `PreparedExperts`.
    """
    if _go_straight(x, weights, experts):
        return _run(x, index, weights, experts)
    if not isinstance(experts.gate, Gate):
        return _differentiable(x, index, weights, experts)
    gate, members = experts.gate, experts.members
    return torch.ops.qpalette.experts(
        x,
        index,
        weights,
        [member.codes for member in members],
        [member.scales for member in members],
        [member.diagonal for member in members],
        [member.spec for member in members],
        [member.rotation for member in members],
        [member.out_features for member in members],
        [member.in_features for member in members],
        members[0].layout,
        len(experts.last),
        experts.first_bias,
        experts.last_bias,
        *(gate.function, gate.gated, gate.interleaved, gate.limit, gate.alpha, gate.offset),
    )


class PreparedExperts:
    """The experts of a layer, checked once, and what their backend prepares for them; see `PreparedLinears`.

    Raises InputError when the matrices do not fit together or one is not what its sizes say, and UnsupportedError when
    no backend runs them.
    """

    def __init__(self, experts: PackedExperts) -> None:
        self.experts = experts
        self._inputs, self._device = experts.first[0][0].in_features, experts.last[0].codes.device
        self._run = _checked_backend(experts).experts(experts)

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `packed_experts`. Raises InputError for operands that do not fit."""
        if not _go_straight(x, weights, self.experts):
            return packed_experts(x, index, weights, self.experts)
        check_vectors(x, self._inputs, self._device)
        check_routes(x, index, weights)
        return self._run(x, index, weights)


def _checked_backend(experts: PackedExperts) -> Backend:
    layouts = set()
    outer, inner = experts.first[0][0].in_features, experts.last[0].in_features
    for first, last in zip(experts.first, experts.last, strict=True):
        for member in (*first, last):
            check_packed(member)
            layouts.add(member.layout)
        if any(member.in_features != outer for member in first) or (last.in_features, last.out_features) != (
            inner,
            outer,
        ):
            raise InputError("experts of one layer have one number of inputs, and their last matrices one shape")
    if len(layouts) != 1:
        raise InputError("experts of one layer have one layout: prepare them together")
    return backend_for(layouts.pop(), experts.last[0].spec, experts.last[0].codes.device)


def _go_straight(x: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> bool:
    fitted = any(bias is not None and bias.requires_grad for bias in (experts.first_bias, experts.last_bias))
    return goes_straight(x) and goes_straight(weights) and not (fitted and torch.is_grad_enabled())


def _run(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    check_vectors(x, experts.first[0][0].in_features, experts.last[0].codes.device)
    check_routes(x, index, weights)
    return _checked_backend(experts).experts(experts)(x, index, weights)


def _differentiable(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: PackedExperts
) -> torch.Tensor:
    def of_expert(rows: torch.Tensor, expert: int) -> torch.Tensor:
        first, last = experts.first[expert], experts.last[expert]
        return experts.of_one(
            rows, expert, lambda x: [packed_linear(x, each) for each in first], lambda x: [packed_linear(x, last)]
        )

    return in_runs(x, index, weights, len(experts.last), of_expert)


def _tables(
    codes: Tensors,
    scales: Tensors,
    diagonals: Tensors,
    specs: list[str],
    rotations: list[str],
    rows: list[int],
    columns: list[int],
    layout: str,
    experts: int,
    first_bias: torch.Tensor | None,
    last_bias: torch.Tensor | None,
    *gate: Any,
) -> PackedExperts:
    members = [
        PackedLinear(words, row_scales, diagonal, spec, rotation, size, inputs, layout)
        for words, row_scales, diagonal, spec, rotation, size, inputs in zip(
            codes, scales, diagonals, specs, rotations, rows, columns, strict=True
        )
    ]
    size = len(members) // experts
    by_expert = [members[start : start + size] for start in range(0, len(members), size)]
    first, last = [each[:-1] for each in by_expert], [each[-1] for each in by_expert]
    return PackedExperts(first, last, Gate(*gate), first_bias, last_bias)


@torch.library.impl(LIBRARY, "experts", "CompositeExplicitAutograd")
def _experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *tables: Any) -> torch.Tensor:
    return _run(x, index, weights, _tables(*tables))


@torch.library.impl(LIBRARY, "experts_backward", "CompositeExplicitAutograd")
def _experts_backward(gradient: torch.Tensor, x: torch.Tensor, *rest: Any) -> Tensors:
    index, weights, *operands = rest
    return gradients_of(gradient, x, index, weights, _tables(*operands))


def gradients_of(
    gradient: torch.Tensor, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: PackedExperts
) -> Tensors:
    """Of x, the weights and the biases there are: the plain products once more, as nothing between them is kept."""
    leaves = [each.detach().requires_grad_() for each in _differentiated(x, weights, experts)]
    biases = iter(leaves[2:])
    first_bias, last_bias = (None if bias is None else next(biases) for bias in (experts.first_bias, experts.last_bias))
    experts = replace(experts, first_bias=first_bias, last_bias=last_bias)
    with torch.enable_grad():
        result = _differentiable(leaves[0], index, leaves[1], experts)
        shares = torch.autograd.grad(result, leaves, gradient, allow_unused=True)
    return [torch.zeros_like(leaf) if share is None else share for leaf, share in zip(leaves, shares, strict=True)]


def _differentiated(x: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> Tensors:
    biases = (experts.first_bias, experts.last_bias)
    return [x, weights, *(bias for bias in biases if bias is not None)]


@torch.library.register_fake("qpalette::experts", lib=LIBRARY)
def _experts_shape(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("qpalette::experts_backward", lib=LIBRARY)
def _experts_backward_shape(gradient: torch.Tensor, x: torch.Tensor, *rest: Any) -> Tensors:
    _, weights, *operands = rest
    return [torch.empty_like(each) for each in _differentiated(x, weights, _tables(*operands))]


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.operands = inputs


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    """An input that is a list of tensors gets a list."""
    _, _, _, codes, scales, diagonals, *fields = ctx.operands
    of_x, of_weights, *of_biases = torch.ops.qpalette.experts_backward(gradient, *ctx.operands)
    lists = [[None] * len(each) for each in (codes, scales, diagonals)]
    biases = iter(of_biases)
    return of_x, None, of_weights, *lists, *(next(biases) if torch.is_tensor(field) else None for field in fields)


torch.library.register_autograd("qpalette::experts", _backward, setup_context=_keep_operands, lib=LIBRARY)
