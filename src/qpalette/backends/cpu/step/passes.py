"""What of a record need not be done at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from qpalette.backends.cpu.step.record import Memory, Operand, Operation


def simplified(operations: Sequence[Operation]) -> list[Operation]:
    """Without what nobody reads, what is the same at every step, and what has been computed already."""
    return _read(_varying(_once(_read(operations))))


def _read(operations: Sequence[Operation]) -> list[Operation]:
    """Those whose results are read later on, or are left in memory of others; a draw of random numbers stays."""
    wanted: set[Memory] = set()
    kept = []
    for operation in reversed(operations):
        if operation.is_random or any(memory.kept is not None or memory in wanted for memory in operation.writes):
            wanted.update(operation.reads)
            kept.append(operation)
    return kept[::-1]


def _varying(operations: Sequence[Operation]) -> list[Operation]:
    """Without those that read nothing but constants: their results were made when they were recorded."""
    writes = Counter(memory for operation in operations for memory in operation.writes)
    constants: set[Memory] = set()
    kept = []
    for operation in operations:
        fixed = not operation.changes and not operation.is_random
        if fixed and all(writes[memory] == 1 for memory in operation.writes) and constants.issuperset(operation.reads):
            constants.update(operation.writes)
        else:
            kept.append(operation)
    for memory in constants:
        memory.kept = memory.made
    return kept


def _once(operations: Sequence[Operation]) -> list[Operation]:
    """Equal operations on equal memory are one."""
    writes = Counter(memory for operation in operations for memory in operation.writes)
    written: Counter[Memory] = Counter()
    found: dict[Hashable, list[Operand]] = {}
    same: dict[Memory, Memory] = {}
    kept = []
    for before in operations:
        operation = _renamed(before, same)
        alone = all(writes[memory] == 1 for memory in operation.writes)
        if operation.changes or operation.is_random or not alone:
            kept.append(operation)
            written.update(operation.writes)
            continue
        versions = tuple(written[memory] for memory in operation.reads)
        layouts = tuple(result[1:] for result in operation.results)
        key = (operation.function, _frozen((operation.arguments, operation.keywords)), versions, layouts)
        if key in found:
            pairs = zip(operation.results, found[key], strict=True)
            same.update((mine.memory, other.memory) for mine, other in pairs)
        else:
            found[key] = operation.results
            kept.append(operation)
            written.update(operation.writes)
    return kept


def _renamed(operation: Operation, same: dict[Memory, Memory]) -> Operation:
    def rename(operand: Operand) -> Operand:
        return operand._replace(memory=same.get(operand.memory, operand.memory))

    arguments, keywords, results, changes = (
        tree_map_only(Operand, rename, each, is_leaf=lambda value: isinstance(value, Operand))
        for each in (operation.arguments, operation.keywords, operation.results, operation.changes)
    )
    return replace(operation, arguments=arguments, keywords=keywords, results=results, changes=changes)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, Operand):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(each)) for name, each in sorted(value.items()))
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return value
    return type(value), repr(value)
