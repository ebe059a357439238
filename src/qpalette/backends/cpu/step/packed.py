"""Products with packed matrices, as a program calls them: those of one input together, as their group would run."""

from __future__ import annotations

from typing import Any, NamedTuple

from qpalette.backends.cpu.layout import LAYOUT
from qpalette.backends.cpu.operands import TYPES
from qpalette.backends.cpu.product import LARGEST_FUSED_BATCH, CpuProduct
from qpalette.backends.cpu.step.record import Memory, Operand, Operation, tensor_of
from qpalette.codes import parse_spec
from qpalette.runtime import PackedLinear


class Packed(NamedTuple):
    """x [batch, K], in one piece, by each of `members`, into `results`."""

    members: list[PackedLinear]
    x: Operand
    results: list[Operand]

    @property
    def memories(self) -> list[Memory]:
        return [self.x.memory, *(result.memory for result in self.results)]

    @property
    def batch(self) -> int:
        return self.x.numel // self.members[0].in_features

    def prepared(self) -> CpuProduct:
        return CpuProduct(self.members)


def packed_of(operation: Operation) -> Packed | None:
    """Of a call of `qpalette::linear`; None where the compiled kernels do not take it."""
    x, *tensors = operation.arguments[:4]
    spec, rotation, layout, rows, columns = operation.arguments[4:9]
    if layout != LAYOUT or x.dtype not in TYPES or any(tensor.memory.kept is None for tensor in tensors):
        return None
    member = PackedLinear(*map(tensor_of, tensors), spec, rotation, rows, columns, layout)
    found = Packed([member], x, [operation.results[0]])
    if not 0 < found.batch <= LARGEST_FUSED_BATCH or not in_one_piece(x) or parse_spec(spec).decoder is None:
        return None
    return found


def in_one_piece(operand: Operand) -> bool:
    """Whether it is contiguous."""
    expected = 1
    for size, stride in zip(reversed(operand.shape), reversed(operand.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
