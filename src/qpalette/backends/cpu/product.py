"""Products with packed matrices, prepared: a call passes addresses to a compiled kernel, and makes nothing anew but its
results."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from qpalette.backends.cpu.decoders import Arrays, decoder_of
from qpalette.backends.cpu.matmul import make_kernels
from qpalette.backends.cpu.operands import LAUNCH, MATRIX, TYPES
from qpalette.backends.cpu.transform import Factors, factors_of
from qpalette.codes import parse_spec
from qpalette.rotate import Rotation, diagonal_of
from qpalette.runtime import PackedLinear

LARGEST_FUSED_BATCH = 16  # above, decoding the matrix once and the vendor's product win

# numba's default thread pool may not be entered twice at the same time, and a launch's arguments are memory of its own.
one_caller = threading.Lock()


class Kernels(NamedTuple):
    linear: Any
    dequantize: Any
    arrays: Arrays


@lru_cache(maxsize=256)
def kernels_of(spec: str) -> Kernels:
    way, arrays = decoder_of(parse_spec(spec))
    return Kernels(*make_kernels(way), arrays)


class CpuProduct:
    """x [..., K] -> W x of each of `members`, which share diagonal and rotation and are laid out in lanes.

    What is changed in place, or put in the place of a tensor's data, is seen by the next call.
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        first = members[0]
        self.members, self.inputs = list(members), first.in_features
        self.rows = [member.out_features for member in members]
        self._factors = factors_of(first.rotation, first.in_features)
        self._tensors = [first.diagonal, *(tensor for member in members for tensor in (member.codes, member.scales))]
        self._addresses: list[int] = []
        self._launches: list[_Launch] = []

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
                for launch in self._present_launches():
                    launch.start(x.data_ptr(), type_, batch, threads, outputs)
        return outputs

    def _present_launches(self) -> list[_Launch]:
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            assert self._factors is not None
            by_kernel: dict[Any, list[int]] = {}
            for index, member in enumerate(self.members):
                by_kernel.setdefault(kernels_of(member.spec).linear, []).append(index)
            self._launches = [_Launch(*each, self.members, self._factors) for each in by_kernel.items()]
            self._addresses = addresses
        return self._launches

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

    def __init__(self, kernel: Any, indices: list[int], members: Sequence[PackedLinear], factors: Factors) -> None:
        self._kernel, self._indices = kernel, indices
        chosen = [members[index] for index in indices]
        all_arrays = [kernels_of(member.spec).arrays for member in chosen]
        self._matrices, self._launch = np.zeros(len(chosen), MATRIX), np.zeros(1, LAUNCH)
        self._kept = factors, all_arrays  # for their addresses
        for matrix, member, arrays in zip(self._matrices, chosen, all_arrays, strict=True):
            describe(matrix, member, arrays)
        first = members[0]
        _fill(
            self._launch[0],
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
            multiplied=_address(self._matrices),
            members=len(chosen),
        )
        self._y, self._address = self._matrices["y"], _address(self._launch)

    def start(self, x: int, type_: int, batch: int, threads: int, outputs: Sequence[torch.Tensor]) -> None:
        """x, an address, is [batch, K] of `type_`; `outputs` are [batch, M] of it, of all members."""
        for place, index in enumerate(self._indices):
            self._y[place] = outputs[index].data_ptr()
        self._kernel(self._address, x, type_, batch, threads)


def describe(matrix: Any, member: PackedLinear, arrays: Arrays) -> None:
    """Fill the MATRIX `matrix`, but for its results, with the addresses of `member` and of its decoder's `arrays`."""
    block_rows, _, tile_words, _ = member.codes.shape
    _fill(
        matrix,
        codes=member.codes.data_ptr(),
        block_rows=block_rows,
        tile_words=tile_words,
        scales=member.scales.data_ptr(),
        rows=member.out_features,
        **{name: _address(array) for name, array in arrays._asdict().items()},
    )


def rotated_weight(packed: PackedLinear) -> torch.Tensor:
    """W', float32 [M, K], of a matrix laid out in lanes."""
    weight = torch.empty(packed.out_features, packed.in_features, dtype=torch.float32)
    kernels = kernels_of(packed.spec)
    with one_caller:
        numba.set_num_threads(present_threads())
        kernels.dequantize(packed.codes.numpy(), packed.scales.numpy(), weight.numpy(), *kernels.arrays)
    return weight


_POOL = numba.get_num_threads()  # all that numba started; it can use fewer, never more


def present_threads() -> int:
    """As many as torch uses."""
    return min(torch.get_num_threads(), _POOL)


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _fill(record: Any, **fields: Any) -> None:
    for name, value in fields.items():
        record[name] = value
