"""The experts that a module holds, under torch.compile: a graph knows them by a name, not by their tensors.

As operands, the 1152 tensors of a layer of 128 experts are traced, guarded and passed one by one, for which a user of
48 layers would wait longer than for all else together.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

from qpalette.core.errors import UnsupportedError
from qpalette.runtime.experts import PreparedExperts, gradients_of
from qpalette.runtime.ops import LIBRARY, Tensors

# `codes` are those of one expert. They are not read: whoever replays what was captured watches their address.
_OPERANDS = "Tensor x, Tensor index, Tensor weights, Tensor codes, Tensor? first_bias, Tensor? last_bias, str holder"
LIBRARY.define(f"held_experts({_OPERANDS}) -> Tensor")
LIBRARY.define(f"held_experts_backward(Tensor gradient, {_OPERANDS}) -> Tensor[]")


class Holder(Protocol):
    """A module whose experts may be exchanged."""

    def is_one_operator(self) -> bool:
        """Whether all of them are their packed matrices and nothing more."""

    def present_operator(self) -> PreparedExperts | None:
        """Of what it holds now; None where that is more than packed matrices."""


_holders: WeakValueDictionary[str, Holder] = WeakValueDictionary()
_numbers = count()


def hold(holder: Holder) -> str:
    """The name by which graphs know it, for as long as it lives."""
    name = f"experts {next(_numbers)}"
    _holders[name] = holder
    return name


def held_experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    first_bias: torch.Tensor | None,
    last_bias: torch.Tensor | None,
    holder: str,
) -> torch.Tensor:
    """As `packed_experts` of what the holder of this name holds when it is called: x, index and weights as there, its
    biases, and the codes of one of its experts.

    Raises UnsupportedError where that is no operator's any more.
    """
    result: torch.Tensor = torch.ops.qpalette.held_experts(x, index, weights, codes, first_bias, last_bias, holder)
    return result


def _held(holder: str) -> PreparedExperts:
    found = _holders.get(holder)
    prepared = None if found is None else found.present_operator()
    if prepared is None:
        raise UnsupportedError(
            "a linear of an expert was fitted, adapted or offloaded after the model was compiled: call "
            "torch.compiler.reset() and compile it again"
        )
    return prepared


@torch.library.impl(LIBRARY, "held_experts", "CompositeExplicitAutograd")
def _forward(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _held(rest[-1])(x, index, weights)


@torch.library.impl(LIBRARY, "held_experts_backward", "CompositeExplicitAutograd")
def _gradients(
    gradient: torch.Tensor, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *rest: Any
) -> Tensors:
    _, first_bias, last_bias, holder = rest
    experts = replace(_held(holder).experts, first_bias=first_bias, last_bias=last_bias)
    return gradients_of(gradient, x, index, weights, experts)


@torch.library.register_fake("qpalette::held_experts", lib=LIBRARY)
def _shape(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("qpalette::held_experts_backward", lib=LIBRARY)
def _gradient_shapes(gradient: torch.Tensor, x: torch.Tensor, index: torch.Tensor, *rest: Any) -> Tensors:
    weights, _, first_bias, last_bias, _ = rest
    return [torch.empty_like(each) for each in (x, weights, first_bias, last_bias) if each is not None]


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.operands = inputs


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    of_x, of_weights, *of_biases = torch.ops.qpalette.held_experts_backward(gradient, *ctx.operands)
    biases = iter(of_biases)
    return of_x, None, of_weights, None, *(None if each is None else next(biases) for each in ctx.operands[4:6]), None


torch.library.register_autograd("qpalette::held_experts", _backward, setup_context=_keep_operands, lib=LIBRARY)


@torch.compiler.assume_constant_result
def is_one_operator(holder: str) -> bool:
    """Whether `held_experts` takes what the holder has now, and the graph stays in this process; under torch.compile,
    when the graph is made."""
    # Asked here, not where torch.compile traces: that of torch 2.11 takes itself for an export.
    if torch.compiler.is_exporting():
        return False
    found = _holders.get(holder)
    return found is not None and found.is_one_operator()
