"""Products with packed matrices, and rows of one, as a program calls them: products of one input together, as their
group would run."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from qpalette.backends.cpu.decoders import decoder_of
from qpalette.backends.cpu.layout import LAYOUT
from qpalette.backends.cpu.operands import MATRIX, TYPES
from qpalette.backends.cpu.product import LARGEST_FUSED_BATCH, CpuProduct, describe, launch_of, multiplier_of
from qpalette.backends.cpu.rows import make_rows
from qpalette.backends.cpu.step.record import Memory, Operand, Operation, tensor_of
from qpalette.backends.cpu.transform import factors_of
from qpalette.codes import parse_spec
from qpalette.runtime import PackedLinear

_LINEAR, _EMBEDDING = "qpalette::linear", "qpalette::embedding"


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


class Rows(NamedTuple):
    """Rows `ids`, int64 in one piece, of `matrix`."""

    matrix: PackedLinear
    ids: Operand
    result: Operand

    @property
    def memories(self) -> list[Memory]:
        return [self.ids.memory, self.result.memory]

    @property
    def kernel(self) -> Any:
        return make_rows(decoder_of(parse_spec(self.matrix.spec)).way)

    def prepared(self, result: int) -> tuple[np.ndarray, Any]:
        """The LAUNCH for results at an address, and what else has to be kept."""
        matrix, factors = self.matrix, factors_of(self.matrix.rotation, self.matrix.in_features, inverse=True)
        assert factors is not None
        multiplier, records = multiplier_of(matrix.spec, in_bytes=False), np.zeros(1, MATRIX)
        describe(records[0], matrix, multiplier)
        records["y"] = result
        return launch_of(matrix, factors, records), (records, factors, multiplier)


def packed_of(operation: Operation) -> Packed | Rows | None:
    """Of a call of `qpalette::linear` or `qpalette::embedding`; None where the compiled kernels do not take it."""
    name = operation.function.name()
    if name not in (_LINEAR, _EMBEDDING):
        return None
    x, *tensors = operation.arguments[:4]
    spec, rotation, layout, rows, columns = operation.arguments[4:9]
    if layout != LAYOUT or not in_one_piece(x) or not x.numel or any(tensor.memory.kept is None for tensor in tensors):
        return None
    codes, scales, diagonal = map(tensor_of, tensors)
    matrix = PackedLinear(codes, scales, diagonal, spec, rotation, rows, columns, layout)
    if factors_of(rotation, columns) is None:
        return None
    if name == _EMBEDDING:
        return Rows(matrix, x, operation.results[0]) if x.dtype == torch.int64 else None
    found = Packed([matrix], x, [operation.results[0]])
    return found if x.dtype in TYPES and found.batch <= LARGEST_FUSED_BATCH else None


def in_one_piece(operand: Operand) -> bool:
    """Whether it is contiguous."""
    expected = 1
    for size, stride in zip(reversed(operand.shape), reversed(operand.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
