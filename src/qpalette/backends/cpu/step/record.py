"""What a piece of work does, as a list of torch's operations on memory: found by letting it run once, watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from qpalette.core.errors import UnsupportedError

# What makes numbers of Python of values, past the operators: a program could not know how they go on.
_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr}
_RESHAPES = {"resize_", "set_"}
_OF_ITS_SHAPE = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
_UNFILLED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(eq=False)
class Memory:
    """Of one storage. `kept` is a tensor of it that has to stay where it is: memory that was there before, and what
    does not change from one time to the next. `made` is the tensor that the record had there."""

    bytes: int
    kept: torch.Tensor | None = None
    made: torch.Tensor | None = None


class Operand(NamedTuple):
    """A tensor, as a view of memory; strides and offset count elements."""

    memory: Memory
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(eq=False)
class Operation:
    """A call of `function`, an OpOverload, with Operands in the place of tensors. What it changes in place is among its
    arguments; `results` are new memory, or such arguments."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: list[Operand]
    changes: list[Operand] = field(default_factory=list)

    @property
    def reads(self) -> Iterator[Memory]:
        if self.function.overloadpacket.__name__ in _OF_ITS_SHAPE:  # not the values of what it is given
            return iter(())
        return (leaf.memory for leaf in operands_of((self.arguments, self.keywords)))

    @property
    def writes(self) -> Iterator[Memory]:
        return (operand.memory for operand in (self.changes or self.results))

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.function.tags


def operands_of(tree: Any) -> list[Operand]:
    """Of nested arguments, in order."""
    return [leaf for leaf in tree_leaves(tree, is_leaf=is_operand) if isinstance(leaf, Operand)]


def tensor_of(operand: Operand) -> torch.Tensor:
    """On memory that is kept."""
    assert operand.memory.kept is not None
    storage = operand.memory.kept.untyped_storage()
    return torch.empty(0, dtype=operand.dtype).set_(storage, operand.offset, operand.shape, operand.strides)


def is_operand(value: Any) -> bool:
    return isinstance(value, Operand)


def record(work: Callable[[], None]) -> list[Operation]:
    """What `work` does, in order, but for views, which are strides. Memory that was there before is left as it is, and
    so is torch's random generator.

    `work` leaves its results in memory that was there before. What it does must not depend on values.
    Raises UnsupportedError where it would: for an operator whose result's shape or whose Python value depends on them.
    """
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]), _NoReads(recorder), recorder:
        work()
    return recorder.operations


class _Recorder(TorchDispatchMode):
    """Operations run, so that shapes and strides are torch's own; but none that changes memory of others."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.running = False
        self._memories: dict[int, Memory] = {}  # all stay: a storage that is freed could come back as another

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        _check(func, args)
        arguments, named = (tree_map_only(torch.Tensor, self._operand, each) for each in (args, keywords))
        changed = _changed(func, args, keywords)
        if any(self._operand(tensor).memory.kept is not None for tensor in changed):
            result = {0: None, 1: changed[0]}.get(len(func._schema.returns), tuple(changed))
        else:
            self.running = True
            try:
                result = func(*args, **keywords)
            finally:
                self.running = False
        self._note(func, arguments, named, result, [self._operand(tensor) for tensor in changed])
        return result

    def _note(self, function: Any, arguments: Any, named: Any, result: Any, changes: list[Operand]) -> None:
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        known = [_key(tensor) in self._memories for tensor in tensors]
        for tensor, is_known in zip(tensors, known, strict=True):
            if not is_known:
                self._memories[_key(tensor)] = Memory(tensor.untyped_storage().nbytes(), made=tensor)
        if function.overloadpacket.__name__ in _UNFILLED or (all(known) and not changes):
            return
        results = [self._operand(tensor) for tensor in tensors]
        self.operations.append(Operation(function, arguments, named, results, changes))

    def _operand(self, tensor: torch.Tensor) -> Operand:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_neg() or tensor.is_conj():
            raise UnsupportedError(f"a step with a tensor that is {tensor.layout} on {tensor.device}")
        memory = self._memories.get(_key(tensor))
        if memory is None:
            memory = self._memories[_key(tensor)] = Memory(tensor.untyped_storage().nbytes(), tensor.detach())
        return Operand(memory, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


class _NoReads(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READS and not self.recorder.running:
            raise UnsupportedError(f"a step whose Python reads values ({func.__name__})")
        return func(*args, **(kwargs or {}))


def _check(function: Any, args: tuple[Any, ...]) -> None:
    name = function.overloadpacket.__name__
    by_place = name in ("index", "index_put", "index_put_") and all(
        index is None or index.dtype in (torch.int64, torch.int32) for index in args[1]
    )
    depends = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(function.tags)
    if name in _RESHAPES or (depends and not by_place):
        raise UnsupportedError(f"a step whose shapes or course depend on values ({function})")


def _changed(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that the operator writes to."""
    if not function._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | keywords
    written = [
        given.get(argument.name)
        for argument in function._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
