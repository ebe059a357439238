"""Which parameters of a model class each tensor of a checkpoint becomes: transformers' own renames and conversions."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

MERGE, CONCATENATE = "MergeModulelist", "Concatenate"
MARK = "qp_codes"  # of any packed tensor


@dataclass(frozen=True)
class Unit:
    """Tensors that become parameters together; the same names on both sides where nothing but a name changes."""

    tensors: tuple[tuple[str, ...], ...]  # those of each pattern of the conversion, in its order; some may have none
    parameters: tuple[str, ...]
    converter: Any = None  # of transformers; None for a rename

    @property
    def of_experts(self) -> bool:
        """Whether each tensor is one expert's, stacked without a change: [rows, columns] of a parameter's
        [experts, sum of rows, columns]."""
        operations = [type(each).__name__ for each in getattr(self.converter, "operations", ())]
        return bool(operations) and operations[0] == MERGE and operations[1:] in ([], [CONCATENATE])

    @property
    def all_tensors(self) -> tuple[str, ...]:
        return tuple(name for names in self.tensors for name in names)


class Names:
    """The names of one model, on whatever device."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self.model = model
        mapping = get_model_conversion_mapping(model)
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._renames: list[Any] = [each for each in mapping if not isinstance(each, WeightConverter)]
        self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}
        self._parameters = model.state_dict()

    def renamed(self, tensor: str) -> tuple[str, str | None]:
        """(the parameter, or the first of those that a conversion makes; the pattern of that conversion)."""
        from transformers.core_model_loading import rename_source_key

        prefix, known = self.model.base_model_prefix, self._parameters
        name, pattern = rename_source_key(tensor, self._renames, self._converters, prefix, known)
        if name not in known and tensor in known:
            return rename_source_key(tensor, [], [], prefix, known)
        return name, pattern

    def units(self, tensors: Iterable[str]) -> list[Unit]:
        """Every unit that makes parameters of the class; tensors that it does not know are in none."""
        from transformers.core_model_loading import dot_natural_key

        plain: list[Unit] = []
        together: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for tensor in sorted(tensors, key=dot_natural_key):  # some renames depend on what came before
            name, pattern = self.renamed(tensor)
            if name not in self._parameters:
                continue
            if pattern is None:
                plain.append(Unit(((tensor,),), (name,)))
            else:
                found = together.setdefault(name, (self._by_pattern[pattern], {}))[1]
                found.setdefault(pattern, []).append(tensor)
        return plain + [self._converted(first, *found) for first, found in together.items()]

    def _converted(self, first: str, converter: Any, found: dict[str, list[str]]) -> Unit:
        start, *others = converter.target_patterns
        parameters = (first, *(first.replace(start, other) for other in others))
        return Unit(tuple(tuple(found.get(each, ())) for each in converter.source_patterns), parameters, converter)


def convert(unit: Unit, tensors: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The parameters that transformers makes of a unit's tensors."""
    return _run(unit.converter, unit.tensors, unit.parameters, tensors, model)


def revert(unit: Unit, parameters: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The tensors that transformers would save for these parameters: `convert` backwards."""
    sides = tuple((name,) for name in unit.parameters)
    return _run(unit.converter.reverse_transform(), sides, unit.all_tensors, parameters, model)


def _run(
    converter: Any,
    given: tuple[tuple[str, ...], ...],
    wanted: tuple[str, ...],
    tensors: dict[str, torch.Tensor],
    model: Any,
) -> dict[str, torch.Tensor]:
    step = deepcopy(converter)
    for pattern, names in zip(step.source_patterns, given, strict=True):
        for name in names:
            step.add_tensor(wanted[0], name, pattern, partial(tensors.__getitem__, name))
    found = step.convert(wanted[0], model=model, config=model.config)
    # Its names are those between two renames; their order is that of the patterns.
    values = [value[0] if isinstance(value, list) else value for value in found.values()]
    return dict(zip(wanted, values, strict=True))


def saved_names(model: Any, modules: Iterable[str]) -> dict[str, str]:
    """Module -> the name before its tensors' own in a checkpoint that `save_pretrained` writes of a loaded model."""
    from transformers.core_model_loading import revert_weight_conversion

    marks = {f"{module}.{MARK}": torch.empty(0) for module in modules}
    of_mark = {id(mark): name for name, mark in marks.items()}
    saved = revert_weight_conversion(model, dict(marks))
    end = len(MARK) + 1
    return {of_mark[id(mark)][:-end]: name[:-end] for name, mark in saved.items()}
