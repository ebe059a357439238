"""Products with packed matrices, prepared: a call passes addresses to a compiled kernel, and makes nothing anew but its
results."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from qpalette.backends.cpu.byte_decoders import byte_decoder_of
from qpalette.backends.cpu.byte_matmul import make_byte_kernel
from qpalette.backends.cpu.decoders import Arrays, decoder_of
from qpalette.backends.cpu.instructions import HAS_BYTES, features
from qpalette.backends.cpu.matmul import make_kernels
from qpalette.backends.cpu.operands import LAUNCH, MATRIX, TYPES
from qpalette.backends.cpu.threads import one_caller, parallel_caller, present_threads
from qpalette.backends.cpu.transform import Factors, factors_of
from qpalette.codes import parse_spec
from qpalette.core.environment import CPU_BYTES
from qpalette.core.errors import InputError
from qpalette.rotate import Rotation, diagonal_of
from qpalette.runtime import PackedLinear
from qpalette.runtime.decoded import BLOCK_ROWS, PIECE, STRIP

logger = logging.getLogger(__name__)
LARGEST_FUSED_BATCH = 16  # in float32: above, decoding the matrix once and the vendor's product win
# Processors that multiply a type as it is. Elsewhere torch's product of it takes several times as long as of float32.
NATIVE = {torch.bfloat16: {"avx512bf16", "amx-bf16"}, torch.float16: {"avx512fp16", "amx-fp16"}}


def wants_bytes(dtype: torch.dtype) -> bool:
    """Whether products with vectors of `dtype` are made in bytes where a code loses little by it (`byte_decoders`): of
    16-bit types, unless $QPALETTE_CPU_BYTES is 0; of float32, too, where it is 1, as for the commands; never of
    float64. Raises InputError for another value of it."""
    asked = os.environ.get(CPU_BYTES) or None
    if asked not in (None, "0", "1"):
        raise InputError(f"{CPU_BYTES} is '{asked}': give 1 for products in bytes where a code allows, 0 for float32")
    return asked != "0" and dtype in TYPES and (asked == "1" or dtype.itemsize == 2)


class Multiplier(NamedTuple):
    """A compiled `linear`, and a code as it takes it: `step` is what 1 stands for in its table. `largest_batch`: None
    where it is the way for any number of tokens."""

    linear: Any
    arrays: Arrays
    step: float
    largest_batch: int | None


@lru_cache(maxsize=512)
def multiplier_of(spec: str, in_bytes: bool) -> Multiplier:
    """The one of `spec`, in bytes where that is asked for and both the code and the processor can."""
    quantizer = parse_spec(spec)
    found = byte_decoder_of(quantizer) if in_bytes else None
    if found is not None:
        return Multiplier(make_byte_kernel(found.way), found.arrays, found.step, None)
    assert quantizer.decoder is not None, "supports() said no"
    if in_bytes and HAS_BYTES and quantizer.decoder.hashed and quantizer.decoder.width > 1:
        _warn_of_pairs(quantizer.family)
    way, arrays = decoder_of(quantizer)
    return Multiplier(make_kernels(way)[0], arrays, 1.0, LARGEST_FUSED_BATCH)


@cache
def _warn_of_pairs(family: str) -> None:
    """Two weights an entry make a table that only a GPU looks up fast, for which such codes are planned."""
    logger.warning(
        "'%s' codes are slow on a processor: quantize with --target cpu for a model that is fast here", family
    )


class CpuProduct:
    """x [..., K] -> W x of each of `members`, which share diagonal and rotation and are laid out in lanes.

    What is changed in place, or put in the place of a tensor's data, is seen by the next call. x is rounded further, to
    bytes, where that is wanted and a code allows it; else it is multiplied in float32.
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
        if x.dtype in TYPES:
            return self._multiplied(x.contiguous(), wants_bytes(x.dtype))
        return [y.to(x.dtype) for y in self._multiplied(x.float().contiguous(), in_bytes=False)]

    def _multiplied(self, x: torch.Tensor, in_bytes: bool) -> list[torch.Tensor]:
        batch = x.numel() // self.inputs
        outputs = [x.new_empty((*x.shape[:-1], rows)) for rows in self.rows]
        if batch == 0:
            return outputs
        launches = [] if self._factors is None else self._present_launches(in_bytes)
        fused = [launch for launch in launches if launch.takes(batch)]
        others = set(range(len(self.members))).difference(*(launch.indices for launch in fused))
        threads = present_threads()
        with one_caller:
            for launch in fused:
                launch.start(x.data_ptr(), TYPES[x.dtype], batch, threads, outputs)
        if others:
            self._multiply_decoded(x, sorted(others), outputs)
        return outputs

    def calls(
        self, x: int, dtype: torch.dtype, batch: int, outputs: Sequence[int]
    ) -> list[tuple[Any, tuple[int, ...]]]:
        """What a call with x at an address would start, for results at addresses: kernels, and their arguments but for
        the threads. They hold for these addresses until the next call of this product."""
        launches = self._present_launches(wants_bytes(dtype))
        return [launch.addressed(x, TYPES[dtype], batch, outputs) for launch in launches]

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

    def _multiply_decoded(self, x: torch.Tensor, indices: Sequence[int], outputs: Sequence[torch.Tensor]) -> None:
        """By torch: some tokens are rotated at a time, and some rows decoded, multiplied and let go."""
        first, tokens = self.members[0], x.reshape(-1, self.inputs)
        rotation, diagonal = Rotation.parse(first.rotation, self.inputs), diagonal_of(first.diagonal, self.inputs)
        rotated = torch.empty_like(tokens)
        for some, into in zip(tokens.split(PIECE), rotated.split(PIECE), strict=True):
            into.copy_(rotation.apply(some.float() * diagonal))
        multiplied = _multiplied_type(x.dtype)
        for index in indices:
            results = outputs[index].view(len(tokens), -1)
            for rows, strip in _strips(self.members[index]):
                weight = strip.to(multiplied).T
                for some, into in zip(rotated.split(PIECE), results[:, rows].split(PIECE), strict=True):
                    into.copy_(some.to(multiplied) @ weight)


class _Launch:
    """What one kernel multiplies: the members at `indices`, decoded in its way."""

    def __init__(
        self, indices: list[int], members: Sequence[PackedLinear], multipliers: Sequence[Multiplier], factors: Factors
    ) -> None:
        first_kind = multipliers[indices[0]]
        self._kernel, self._largest_batch, self.indices = first_kind.linear, first_kind.largest_batch, indices
        chosen = [(members[index], multipliers[index]) for index in indices]
        self._matrices = np.zeros(len(chosen), MATRIX)
        self._kept = factors, multipliers  # for their addresses
        for matrix, (member, multiplier) in zip(self._matrices, chosen, strict=True):
            describe(matrix, member, multiplier)
        self._launch = launch_of(members[0], factors, self._matrices)
        self._y, self._address = self._matrices["y"], _address(self._launch)

    def takes(self, batch: int) -> bool:
        return self._largest_batch is None or batch <= self._largest_batch

    def start(self, x: int, type_: int, batch: int, threads: int, outputs: Sequence[torch.Tensor]) -> None:
        """x, an address, is [batch, K] of `type_`; `outputs` are [batch, M] of it, of all members."""
        kernel, arguments = self.addressed(x, type_, batch, [output.data_ptr() for output in outputs])
        kernel(*arguments, threads)

    def addressed(self, x: int, type_: int, batch: int, outputs: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
        """The kernel, and its arguments but for the threads."""
        for place, index in enumerate(self.indices):
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
    return _decoded(packed, packed.codes, packed.scales)


def _strips(packed: PackedLinear) -> Iterator[tuple[slice, torch.Tensor]]:
    """W' in parts of some rows: which ones, and their weights."""
    blocks = max(1, STRIP // (BLOCK_ROWS * packed.in_features))
    starts = range(0, packed.out_features, blocks * BLOCK_ROWS)
    for codes, start in zip(packed.codes.split(blocks), starts, strict=True):
        rows = slice(start, min(start + blocks * BLOCK_ROWS, packed.out_features))
        yield rows, _decoded(packed, codes, packed.scales[rows])


def _decoded(packed: PackedLinear, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """As many rows as there are `scales`, of these rows of blocks."""
    weight = torch.empty(len(scales), packed.in_features, dtype=torch.float32)
    way, arrays = decoder_of(parse_spec(packed.spec))
    _, dequantize = make_kernels(way)
    with parallel_caller():
        dequantize(codes.numpy(), scales.numpy(), weight.numpy(), *arrays)
    return weight


def _multiplied_type(dtype: torch.dtype) -> torch.dtype:
    return dtype if NATIVE.get(dtype, set()) & features() else torch.float32


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _fill(record: Any, **fields: Any) -> None:
    for name, value in fields.items():
        record[name] = value
