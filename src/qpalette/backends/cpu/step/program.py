"""A record as a program: compiled calls on fixed addresses, and one loop over them; torch is called for what has no
kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from qpalette.backends.cpu.calls import address_of
from qpalette.backends.cpu.step import kernels
from qpalette.backends.cpu.step.lower import lowered
from qpalette.backends.cpu.step.native import FAULT, Address, Native
from qpalette.backends.cpu.step.packed import Packed, Rows, packed_of
from qpalette.backends.cpu.step.passes import simplified
from qpalette.backends.cpu.step.record import Memory, Operand, Operation, is_operand, operands_of, record, tensor_of
from qpalette.backends.cpu.threads import one_caller, present_threads

_LINE = 64  # bytes, at which memory begins


class Called(NamedTuple):
    """An operation that torch does."""

    operation: Operation

    @property
    def memories(self) -> list[Memory]:
        operation = self.operation
        named = (operation.arguments, operation.keywords, operation.results)
        return [operand.memory for operand in operands_of(named)]


Instruction = Native | Packed | Rows | Called


def instructions_of(work: Callable[[], None]) -> list[Instruction]:
    """What `work` does, which is run, but leaves no trace: see `record`, whose errors these are."""
    return _translated(simplified(record(work)))


def _translated(operations: Sequence[Operation]) -> list[Instruction]:
    read = {memory for operation in operations for memory in operation.reads}
    instructions: list[Instruction] = []
    groups: dict[Hashable, Packed] = {}  # what else is multiplied by one x may join
    written: dict[Memory, int] = {}
    for operation in operations:
        packed = packed_of(operation)
        if isinstance(packed, Rows):
            instructions.append(packed)
        elif packed is not None:
            version, group = written.get(packed.x.memory, 0), operation.arguments[9]
            key = (group, version, packed.x) if group else object()
            if key in groups:
                groups[key].members.extend(packed.members)
                groups[key].results.extend(packed.results)
            else:
                groups[key] = packed
                instructions.append(packed)
        else:
            native = lowered(operation, read)
            instructions.extend([Called(operation)] if native is None else native)
        for memory in operation.writes:
            written[memory] = written.get(memory, 0) + 1
    return instructions


def kernels_of(instructions: Sequence[Instruction]) -> set[Any]:
    """Those that a program of these calls, but for packed products', which have run before."""
    native = {kernel for each in instructions if isinstance(each, Native) for kernel in each.kernels}
    return {kernels.run, *native, *(each.kernel for each in instructions if isinstance(each, Rows))}


class Program:
    """Does what was recorded, again and again, on the memory that was there; its own is one piece. For one thread at a
    time. With `apart` each instruction is one of `parts`, which can be timed, instead of as many as run together."""

    def __init__(self, instructions: Sequence[Instruction], apart: bool = False) -> None:
        self._kept: list[Any] = [each.kept for one in instructions for each in one.memories if each.kept is not None]
        self._fault, self._scratch = np.zeros(1, np.int64), np.zeros(kernels.SCRATCH // 8, np.int64)
        self._places, size = _placed(instructions)
        self._arena = torch.zeros(size, dtype=torch.uint8)
        self.parts: list[Callable[[], None]] = []
        rows: list[tuple[int, ...]] = []
        for instruction in instructions:
            if isinstance(instruction, Called):
                self._close(rows)
                self.parts.append(self._call_of(instruction.operation))
            else:
                rows += self._rows_of(instruction)
            if apart:
                self._close(rows)
        self._close(rows)
        self._places.clear()

    @property
    def bytes(self) -> int:
        """Of its own memory."""
        return self._arena.nbytes

    @torch.no_grad()
    def replay(self) -> None:
        """Raises IndexError where an index is out of range."""
        for part in self.parts:
            part()
        if self._fault[0]:
            self._fault[0] = 0
            raise IndexError("an index is out of range")

    def _close(self, rows: list[tuple[int, ...]]) -> None:
        if not rows:
            return
        table = np.array(rows, np.int64)
        rows.clear()

        def start() -> None:
            threads = present_threads()
            with one_caller:
                kernels.run(table, threads)

        self.parts.append(start)

    def _rows_of(self, instruction: Native | Packed | Rows) -> list[tuple[int, ...]]:
        if isinstance(instruction, Native):
            words = np.array([self._word(word) for word in instruction.words], np.int64)
            self._kept.append(words)
            return [(address_of(instruction.kernel), words.ctypes.data, self._scratch.ctypes.data, 0, 0)]
        if isinstance(instruction, Rows):
            launch, kept = instruction.prepared(self._address(instruction.result))
            self._kept += [launch, kept]
            ids, fault = instruction.ids, self._fault.ctypes.data
            return [(address_of(instruction.kernel), launch.ctypes.data, self._address(ids), ids.numel, fault)]
        product, x = instruction.prepared(), instruction.x
        self._kept.append(product)
        outputs = [self._address(result) for result in instruction.results]
        calls = product.calls(self._address(x), x.dtype, instruction.batch, outputs)
        return [(address_of(kernel), *arguments) for kernel, arguments in calls]

    def _word(self, word: Any) -> int:
        if isinstance(word, Operand):
            return self._address(word)
        if isinstance(word, Address):
            return address_of(word.kernel)
        return self._fault.ctypes.data if word is FAULT else word

    def _address(self, operand: Operand) -> int:
        memory = operand.memory
        if memory.kept is not None:
            base = memory.kept.untyped_storage().data_ptr()
        else:
            base = self._arena.data_ptr() + self._places[memory]
        return base + operand.offset * operand.dtype.itemsize

    def _tensor(self, operand: Operand) -> torch.Tensor:
        if operand.memory.kept is not None:
            return tensor_of(operand)
        start = self._places[operand.memory] // operand.dtype.itemsize + operand.offset
        return self._arena.view(operand.dtype).as_strided(operand.shape, operand.strides, start)

    def _call_of(self, operation: Operation) -> Callable[[], None]:
        function = operation.function
        arguments, keywords, results = (
            tree_map_only(Operand, self._tensor, each, is_leaf=is_operand)
            for each in (operation.arguments, operation.keywords, operation.results)
        )
        if operation.changes:
            return lambda: function(*arguments, **keywords)

        def call() -> None:
            made = (each for each in tree_leaves(function(*arguments, **keywords)) if isinstance(each, torch.Tensor))
            for place, value in zip(results, made, strict=True):
                place.copy_(value)

        return call


def _placed(instructions: Sequence[Instruction]) -> tuple[dict[Memory, int], int]:
    """Where in one piece of memory each has its own while it is used, in bytes; and the size of the piece."""
    first: dict[Memory, int] = {}
    last: dict[Memory, int] = {}
    for time, instruction in enumerate(instructions):
        for memory in instruction.memories:
            if memory.kept is None:
                first.setdefault(memory, time)
                last[memory] = time
    places: dict[Memory, int] = {}
    held: list[tuple[int, int, Memory]] = []  # by place: where it begins, where it ends
    size = 0
    for memory in first:  # in the order of first use
        held = [each for each in held if last[each[2]] >= first[memory]]
        needed, start = -(-max(memory.bytes, 1) // _LINE) * _LINE, 0
        for begin, end, _ in held:
            if begin - start >= needed:
                break
            start = max(start, end)
        places[memory] = start
        held = sorted([*held, (start, start + needed, memory)], key=lambda each: each[:2])
        size = max(size, start + needed)
    return places, size
