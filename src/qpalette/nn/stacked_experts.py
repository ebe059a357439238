"""Experts of a class whose own code picks their matrices from a stack: the code stays, the stack is packed."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from qpalette.core.records import LinearRecord
from qpalette.models.resolver import Place
from qpalette.nn.packed_weight import PackedStack
from qpalette.nn.quant_experts import add_linears, check_fit
from qpalette.nn.quant_linear import QuantLinear


class StackedExperts(nn.Module):
    """Mixed into the class of a module whose parameters stack the weights of all experts: each of those parameters is a
    `PackedStack` then, of numbered children with a `QuantLinear` each."""

    packed_places: dict[str, Place]  # "3.gate_proj" and the like

    def stack(self, parameter: str) -> PackedStack:
        """What the class's code finds under the name of a parameter."""
        members = [(key, place) for key, place in self.packed_places.items() if place.parameter == parameter]
        experts: dict[int, list[QuantLinear]] = {}
        for key, place in sorted(members, key=lambda each: (each[1].expert, each[1].part)):
            experts.setdefault(place.expert or 0, []).append(self._linear(key))
        return PackedStack(list(experts.values()), members[0][1].transposed)

    def _linear(self, key: str) -> QuantLinear:
        holder: Any = self if key.partition(".")[0] in self._modules else self.get_submodule("experts")
        return holder.get_submodule(key)

    def dequantize(self, dtype: torch.dtype) -> nn.Module:
        """The original module, its parameters the decoded weights rounded once to `dtype`."""
        parameters = {place.parameter for place in self.packed_places.values()}
        dense = {name: self.stack(name).decoded(dtype).contiguous() for name in parameters}
        for child in [name for name in self._modules if name == "experts" or name.isdigit()]:
            del self._modules[child]
        self.__class__ = type(self).__bases__[1]
        del self.packed_places
        for name, weight in dense.items():
            self.register_parameter(name, nn.Parameter(weight))
        return self


def pack_stacks(module: nn.Module, records: Mapping[str, LinearRecord], places: Mapping[str, Place], name: str) -> None:
    """Make a `StackedExperts` of `module`. Raises ArtifactError when the records do not fit its parameters."""
    parameters = dict(module.named_parameters(recurse=False))
    stacks = {place.parameter: parameters[place.parameter] for place in places.values()}
    check_fit(records, _shapes(stacks, places), name)
    first = next(iter(stacks.values()))
    holder = module
    if name.rpartition(".")[2] != "experts":
        holder = nn.Module()
        module.add_module("experts", holder)
    add_linears(holder, records, first.dtype, first.device)
    for parameter in stacks:
        delattr(module, parameter)
    shown = {parameter: property(partial(_stack_of, parameter)) for parameter in stacks}
    if hasattr(module, "has_gate"):  # its own code for one expert at a time, not transformers' for all
        config: Any = copy(module.config)
        config._experts_implementation = "eager"
        module.config = config
    module.packed_places = dict(places)  # type: ignore[assignment]
    module.__class__ = type(type(module).__name__, (StackedExperts, type(module)), shown)


def _stack_of(parameter: str, module: StackedExperts) -> PackedStack:
    return module.stack(parameter)


def _shapes(stacks: Mapping[str, torch.Tensor], places: Mapping[str, Place]) -> dict[str, tuple[int, int]]:
    """Of every expert: those that the records lack are then named."""
    leaves = {key.partition(".")[2]: place for key, place in places.items()}
    shapes: dict[str, tuple[int, int]] = {}
    for leaf, place in leaves.items():
        count, *matrix = stacks[place.parameter].shape
        rows, columns = reversed(matrix) if place.transposed else matrix
        shapes |= {f"{index}.{leaf}": (rows // place.parts, columns) for index in range(count)}
    return shapes
