"""Products with packed matrices, prepared: a call passes addresses to a compiled kernel, and makes nothing anew but its
results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from qpalette.backends.cpu.byte_decoders import byte_decoder_of
from qpalette.backends.cpu.byte_matmul import make_byte_kernel
from qpalette.backends.cpu.decoders import Arrays, decoder_of
from qpalette.backends.cpu.matmul import make_kernels
from qpalette.backends.cpu.operands import LAUNCH, MATRIX, TYPES
from qpalette.backends.cpu.threads import one_caller, parallel_caller, present_threads
from qpalette.backends.cpu.transform import Factors, factors_of
from qpalette.codes import parse_spec
from qpalette.rotate import Rotation, diagonal_of
from qpalette.runtime import PackedLinear

LARGEST_FUSED_BATCH = 16  # above, decoding the matrix once and the vendor's product win


class Multiplier(NamedTuple):
    """A compiled `linear`, and a code as it takes it: `step` is what 1 stands for in its table."""

    linear: Any
    arrays: Arrays
    step: float


@lru_cache(maxsize=512)
def multiplier_of(spec: str, in_bytes: bool) -> Multiplier:
    """The one of `spec`, in bytes where that is asked for and both the code and the processor can."""
    quantizer = parse_spec(spec)
    found = byte_decoder_of(quantizer) if in_bytes else None
    if found is not None:
        return Multiplier(make_byte_kernel(found.way), found.arrays, found.step)
    way, arrays = decoder_of(quantizer)
    return Multiplier(make_kernels(way)[0], arrays, 1.0)


class CpuProduct:
    """x [..., K] -> W x of each of `members`, which share diagonal and rotation and are laid out in lanes.

    What is changed in place, or put in the place of a tensor's data, is seen by the next call. x of 16 bits is rounded
    further, to bytes, where a code allows it (`byte_decoders`); float32 and float64 are multiplied in float32.
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        first = members[0]
        self.members, self.inputs = list(members), first.in_features
        self.rows = [member.out_features for member in members]
        self._factors = factors_of(first.rotation, first.in_features)
        self._tensors = [first.diagonal, *(tensor for member in members for tensor in (member.codes, member.scales))]
        self._addresses: list[int] = []
        self._launches: dict[bool, list[_Launch]] = {}

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """A contiguous [..., M] for each member, of x's dtype."""
        batch, type_ = x.numel() // self.inputs, TYPES.get(x.dtype)
        if batch > LARGEST_FUSED_BATCH or self._factors is None:
            return self._decoded(x)
        if type_ is None:
            return [y.to(x.dtype) for y in self(x.float())]
        if not x.is_contiguous():
            x = x.contiguous()
        *shape, _ = x.shape
        outputs = [x.new_empty((*shape, rows)) for rows in self.rows]
        if batch:
            threads = present_threads()
            with one_caller:
                for launch in self._present_launches(in_bytes=x.dtype != torch.float32):
                    launch.start(x.data_ptr(), type_, batch, threads, outputs)
        return outputs

    def calls(self, x: int, type_: int, batch: int, outputs: Sequence[int]) -> list[tuple[Any, tuple[int, ...]]]:
        """What a call with x at an address would start, for results at addresses: kernels, and their arguments but for
        the threads. They hold for these addresses until the next call of this product."""
        launches = self._present_launches(in_bytes=type_ != TYPES[torch.float32])
        return [launch.addressed(x, type_, batch, outputs) for launch in launches]

    def _present_launches(self, in_bytes: bool) -> list[_Launch]:
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            self._launches, self._addresses = {}, addresses
        if in_bytes not in self._launches:
            self._launches[in_bytes] = self._prepared(in_bytes)
        return self._launches[in_bytes]

    def _prepared(self, in_bytes: bool) -> list[_Launch]:
        assert self._factors is not None
        multipliers = [multiplier_of(member.spec, in_bytes) for member in self.members]
        by_kernel: dict[Any, list[int]] = {}
        for index, multiplier in enumerate(multipliers):
            by_kernel.setdefault(multiplier.linear, []).append(index)
        return [_Launch(indices, self.members, multipliers, self._factors) for indices in by_kernel.values()]

    def _decoded(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One rotation by torch, then each matrix decoded and multiplied by the vendor's library, in x's type."""
        first = self.members[0]
        rotation = Rotation.parse(first.rotation, self.inputs)
        work = x.reshape(-1, self.inputs).float() * diagonal_of(first.diagonal, self.inputs)
        rotated = rotation.apply(work).to(x.dtype)
        return [
            (rotated @ rotated_weight(member).to(x.dtype).T).reshape(*x.shape[:-1], member.out_features)
            for member in self.members
        ]


class _Launch:
    """What one kernel multiplies: the members at `indices`, decoded in its way."""

    def __init__(
        self, indices: list[int], members: Sequence[PackedLinear], multipliers: Sequence[Multiplier], factors: Factors
    ) -> None:
        self._kernel, self._indices = multipliers[indices[0]].linear, indices
        chosen = [(members[index], multipliers[index]) for index in indices]
        self._matrices = np.zeros(len(chosen), MATRIX)
        self._kept = factors, multipliers  # for their addresses
        for matrix, (member, multiplier) in zip(self._matrices, chosen, strict=True):
            describe(matrix, member, multiplier)
        self._launch = launch_of(members[0], factors, self._matrices)
        self._y, self._address = self._matrices["y"], _address(self._launch)

    def start(self, x: int, type_: int, batch: int, threads: int, outputs: Sequence[torch.Tensor]) -> None:
        """x, an address, is [batch, K] of `type_`; `outputs` are [batch, M] of it, of all members."""
        kernel, arguments = self.addressed(x, type_, batch, [output.data_ptr() for output in outputs])
        kernel(*arguments, threads)

    def addressed(self, x: int, type_: int, batch: int, outputs: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
        """The kernel, and its arguments but for the threads."""
        for place, index in enumerate(self._indices):
            self._y[place] = outputs[index]
        return self._kernel, (self._address, x, type_, batch)


def launch_of(first: PackedLinear, factors: Factors, matrices: np.ndarray) -> np.ndarray:
    """The LAUNCH of `matrices`, MATRIX, with the diagonal of `first`."""
    launch = np.zeros(1, LAUNCH)
    _fill(
        launch[0],
        features=first.in_features,
        diagonal=first.diagonal.data_ptr(),
        has_signs=first.diagonal.dtype == torch.uint8,
        orders=_address(factors.orders),
        inners=_address(factors.inners),
        offsets=_address(factors.offsets),
        factors=len(factors.orders),
        matrices=_address(factors.matrices),
        matrices_size=len(factors.matrices),
        scale=factors.scale,
        multiplied=_address(matrices),
        members=len(matrices),
    )
    return launch


def describe(matrix: Any, member: PackedLinear, multiplier: Multiplier) -> None:
    """Fill the MATRIX `matrix`, but for its results, with the addresses of `member` and of its decoder's arrays."""
    block_rows, _, tile_words, _ = member.codes.shape
    _fill(
        matrix,
        codes=member.codes.data_ptr(),
        block_rows=block_rows,
        tile_words=tile_words,
        scales=member.scales.data_ptr(),
        rows=member.out_features,
        step=multiplier.step,
        **{name: _address(array) for name, array in multiplier.arrays._asdict().items()},
    )


def rotated_weight(packed: PackedLinear) -> torch.Tensor:
    """W', float32 [M, K], of a matrix laid out in lanes."""
    weight = torch.empty(packed.out_features, packed.in_features, dtype=torch.float32)
    way, arrays = decoder_of(parse_spec(packed.spec))
    _, dequantize = make_kernels(way)
    with parallel_caller():
        dequantize(packed.codes.numpy(), packed.scales.numpy(), weight.numpy(), *arrays)
    return weight


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _fill(record: Any, **fields: Any) -> None:
    for name, value in fields.items():
        record[name] = value
