"""The experts of a mixture, each with linears of its own whose weights stay packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import nn

from qpalette.core.errors import ArtifactError
from qpalette.core.records import LinearRecord
from qpalette.models.resolver import Place
from qpalette.nn.packed_module import PackedModule
from qpalette.nn.packed_weight import PackedStack
from qpalette.nn.quant_linear import QuantLinear
from qpalette.runtime import (
    Gate,
    PackedExperts,
    PreparedExperts,
    held_experts,
    hold,
    in_runs,
    is_one_operator,
    packed_experts,
    recognise,
)

DOWN = "down_proj"  # the parameter of what comes last, in every class that holds experts


class QuantExperts(nn.Module):
    """Stands in for a module of transformers 5 whose parameters hold the weights of all experts, [experts, ., .].

    Children are numbered, and each has a `QuantLinear` per linear of its expert, named as in the checkpoint. Biases
    stay where they were. All experts are one call of one operator (`runtime/experts.py`), which takes the children's
    tensors and does not call them; only where one of them is more than its packed matrix are they called one by one.
    """

    _operator: PreparedExperts | None
    _seen: int  # `PackedModule.exchanged` when it was made

    def __init__(
        self, original: Any, records: Mapping[str, LinearRecord], places: Mapping[str, Place], name: str = "experts"
    ) -> None:
        """`records` and `places` have "3.gate_proj" and the like. Raises ArtifactError when they do not fit
        `original`."""
        super().__init__()
        self._original: tuple[Any] = (original,)  # in a tuple: not a child; its weights are not used
        self.first, self.down = _roles(places)
        shapes = _shapes(original, self.first, self.down)
        wanted = {f"{index}.{leaf}": shape for index in range(original.num_experts) for leaf, shape in shapes.items()}
        check_fit(records, wanted, name)
        self._gate, self._operator, self._seen, self._name = _gate_of(original), None, -1, hold(self)
        weight = original.down_proj
        add_linears(self, records, weight.dtype, weight.device)
        for bias in ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias"):
            if (parameter := getattr(original, bias, None)) is not None:
                self.register_parameter(bias, parameter)

    def forward(self, hidden_states: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [tokens, K]; experts int64 [tokens, top k] and their weights -> [tokens, K]."""
        if hidden_states.is_meta:
            return torch.empty_like(hidden_states)
        if torch.compiler.is_compiling():
            return self._traced(hidden_states, experts, weights)
        operator = self.present_operator()
        if operator is not None:
            return operator(hidden_states, experts, weights)
        return self._in_runs(hidden_states, experts, weights)

    def _traced(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Of this process, a graph knows the experts by a name; one that leaves it has their tensors."""
        if is_one_operator(self._name):
            codes = _linear(self.get_submodule("0"), self.down).qp_codes
            return held_experts(x, experts, weights, codes, *self._biases, self._name)
        if isinstance(self._gate, Gate) and self.is_one_operator():
            return packed_experts(x, experts, weights, self._packed())
        return self._in_runs(x, experts, weights)

    def present_operator(self) -> PreparedExperts | None:
        """None where the experts must be called one by one."""
        if self._seen != PackedModule.exchanged:
            self._operator = PreparedExperts(self._packed()) if self.is_one_operator() else None
            self._seen = PackedModule.exchanged
        return self._operator

    def is_one_operator(self) -> bool:
        """False where a linear is more than its packed matrix: fitted, adapted, brought from elsewhere when it is
        called."""
        linears = [linear for expert in self.children() for linear in expert.children()]
        plain = all(type(each) is QuantLinear and not each.fitted and "forward" not in vars(each) for each in linears)
        alike = plain and len({(each.layout, each.qp_codes.device) for each in linears}) == 1
        return alike and linears[0].qp_codes.device.type != "meta"

    def _packed(self) -> PackedExperts:
        experts = [[_linear(expert, leaf).stored for leaf in (*self.first, self.down)] for expert in self.children()]
        first_bias, last_bias = self._biases
        return PackedExperts(
            first=[linears[:-1] for linears in experts],
            last=[linears[-1] for linears in experts],
            gate=self._gate,
            first_bias=first_bias,
            last_bias=last_bias,
        )

    @property
    def _biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of what comes first, and of what comes last."""
        first = self._parameters.get("gate_up_proj_bias", self._parameters.get("up_proj_bias"))
        return first, self._parameters.get("down_proj_bias")

    def _in_runs(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return in_runs(x, experts, weights, self._original[0].num_experts, self._run)

    def _run(self, x: torch.Tensor, index: int) -> torch.Tensor:
        expert = self.get_submodule(str(index))
        first = torch.cat([_linear(expert, leaf)(x) for leaf in self.first], dim=-1)
        first = first + self._bias("gate_up_proj_bias", index) + self._bias("up_proj_bias", index)
        return _linear(expert, self.down)(self._gate(first)) + self._bias("down_proj_bias", index)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._operator, self._seen = None, -1  # it holds the tensors that go
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """What is prepared has addresses in it, which a copy does not share."""
        return self.__dict__ | {"_operator": None, "_seen": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another holder."""
        super().__setstate__(state)
        self._name = hold(self)

    @property
    def gate_up_proj(self) -> PackedStack:
        """What code that reads the class's parameter gets."""
        return self._stack(self.first)

    @property
    def up_proj(self) -> PackedStack:
        return self._stack(self.first)

    @property
    def down_proj(self) -> PackedStack:
        return self._stack((self.down,))

    def _stack(self, leaves: Sequence[str]) -> PackedStack:
        experts = [[_linear(expert, leaf) for leaf in leaves] for expert in self.children()]
        return PackedStack(experts, self._original[0].is_transposed)

    def _bias(self, name: str, index: int) -> Any:
        parameter = self._parameters.get(name)
        return 0 if parameter is None else parameter[index]

    def dequantize(self, dtype: torch.dtype) -> nn.Module:
        """The original module, its parameters the decoded weights rounded once to `dtype`."""
        original: Any = self._original[0]
        first = "gate_up_proj" if hasattr(original, "gate_up_proj") else "up_proj"
        for name, leaves in ((first, self.first), (DOWN, (self.down,))):
            setattr(original, name, nn.Parameter(self._stack(leaves).decoded(dtype).contiguous()))
        for name, bias in self.named_parameters(recurse=False):
            setattr(original, name, nn.Parameter(bias.detach().to(dtype)))
        original.train(self.training)
        return original


def _gate_of(original: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the class has between its products, as data if it is known: numbers are called what classes call them."""
    own = original._apply_gate if original.has_gate else original.act_fn
    limit, alpha = (
        next((float(getattr(original, name)) for name in names if getattr(original, name, None) is not None), None)
        for names in (("limit", "swiglu_limit"), ("alpha", "swiglu_alpha"))
    )
    return recognise(own, original.has_gate, limit, 1.0 if alpha is None else alpha) or own


class _Expert(nn.Module):
    """Holds the linears of one expert; another module in the place of one of them counts as an exchange of tensors."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        PackedModule.exchanged += 1


def check_fit(records: Mapping[str, LinearRecord], wanted: Mapping[str, tuple[int, int]], name: str) -> None:
    """Raises ArtifactError naming the first expert's linear that is not what it must be."""
    found = {key: (record.out_features, record.in_features) for key, record in records.items()}
    if found != wanted:
        key = min(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        present, due = (_spelled(each.get(key)) for each in (found, wanted))
        raise ArtifactError(f"expert linear '{name}.{key}' is {present}, but must be {due}")


def add_linears(
    module: nn.Module, records: Mapping[str, LinearRecord], dtype: torch.dtype, device: torch.device
) -> None:
    """Numbered children of `module`, each with the linears of one expert."""
    for key, record in sorted(records.items(), key=lambda item: int(item[0].partition(".")[0])):
        index, _, leaf = key.partition(".")
        if index not in module._modules:
            module.add_module(index, _Expert())
        module.get_submodule(index).add_module(leaf, QuantLinear(record, dtype=dtype, device=device))


def _roles(places: Mapping[str, Place]) -> tuple[tuple[str, ...], str]:
    """(the leaves that an expert computes first, in the order in which its activation takes them; the last)."""
    order = {key.partition(".")[2]: place for key, place in places.items()}
    first = sorted(
        (leaf for leaf, place in order.items() if place.parameter != DOWN), key=lambda leaf: order[leaf].part
    )
    return tuple(first), next((leaf for leaf, place in order.items() if place.parameter == DOWN), "")


def _spelled(shape: tuple[int, int] | None) -> str:
    return "missing" if shape is None else f"{shape[0]} x {shape[1]}"


def _linear(expert: nn.Module, leaf: str) -> QuantLinear:
    return cast(QuantLinear, expert.get_submodule(leaf))


def _shapes(module: Any, first: tuple[str, ...], down: str) -> dict[str, tuple[int, int]]:
    """leaf -> (out_features, in_features) of one expert."""
    weight = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
    rows, columns = (weight.shape[axis] for axis in ((2, 1) if module.is_transposed else (1, 2)))
    result = {leaf: (rows // max(1, len(first)), columns) for leaf in first}
    rows, columns = (module.down_proj.shape[axis] for axis in ((2, 1) if module.is_transposed else (1, 2)))
    return result | {down or DOWN: (rows, columns)}
