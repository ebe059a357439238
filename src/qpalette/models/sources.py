"""The way back: from the linears of a quantized model to the tensors that the original had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from qpalette.core.errors import CheckpointError
from qpalette.models.names import Names, Unit, revert
from qpalette.models.resolver import Place, places_of

Weights = Callable[[str], torch.Tensor]  # a linear's name -> its weight [out_features, in_features]


class Sources:
    """Tensors of an original, each made of the weights of linears.

    `sources` maps a linear's name to the tensors that it was made of. Raises CheckpointError when a tensor held more
    than one plain matrix and transformers has no class that says what.
    """

    def __init__(self, model: Any | None, sources: Mapping[str, tuple[str, ...]]) -> None:
        self._model = model
        self._linears: dict[str, list[str]] = {}  # tensor -> the linears in it
        for linear, tensors in sources.items():
            for tensor in tensors:
                self._linears.setdefault(tensor, []).append(linear)
        plain = {tensor for tensor, linears in self._linears.items() if linears == [tensor.removesuffix(".weight")]}
        self._places: dict[str, Place] = {}
        self._units: dict[str, Unit] = {}
        if model is None and plain != self._linears.keys():
            odd = min(self._linears.keys() - plain)
            raise CheckpointError(f"'{odd}' holds several matrices, and transformers has no class that says which")
        if model is not None:
            self._places = places_of(model, sources)
            units = Names(model).units(self._linears)
            self._units = {tensor: unit for unit in units for tensor in unit.all_tensors}

    @property
    def tensors(self) -> Iterable[str]:
        return self._linears

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._linears

    def read(self, tensor: str, weight: Weights) -> torch.Tensor:
        """The tensor as the original had it, of these weights."""
        unit, linears = self._units.get(tensor), self._linears[tensor]
        if unit is None or unit.of_experts:
            return weight(linears[0])
        parameters = {name: self._parameter(name, linears, weight) for name in unit.parameters}
        if unit.converter is None:
            return parameters[unit.parameters[0]]
        return revert(unit, parameters, self._model)[tensor]

    def _parameter(self, name: str, linears: list[str], weight: Weights) -> torch.Tensor:
        members = [(self._places[linear], linear) for linear in linears if self._places[linear].path == name]
        matrices = list(_oriented(sorted(members, key=lambda each: each[0].expert or 0), weight))
        return torch.stack(matrices) if members[0][0].expert is not None else matrices[0]


def _oriented(members: Iterable[tuple[Place, str]], weight: Weights) -> Iterator[torch.Tensor]:
    for place, linear in members:
        matrix = weight(linear)
        yield matrix.T.contiguous() if place.transposed else matrix
