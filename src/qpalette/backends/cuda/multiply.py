"""Products with packed matrices on a CUDA device: how the work is cut, and the launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from math import ceil, log2, sqrt
from pathlib import Path
from typing import Any

import torch

from qpalette.backends.cuda.compiler import launch, load_kernel
from qpalette.backends.cuda.decoder import DecoderSpec, decoder_spec, entries, with_decoders
from qpalette.backends.cuda.decoder_sets import DecoderSets
from qpalette.backends.cuda.layout import check_layout
from qpalette.backends.cuda.rotate import TYPES, Rotated
from qpalette.runtime import PackedLinear

SOURCE = Path(__file__).with_name("multiply.cu").read_text()
MOST_SEGMENTS = 8
MOST_BATCH = 16
THREADS = 512  # of 128 registers; x' takes 32 of them, 64 above a batch of 8
MOST_TABLE_BYTES = 1 << 17
MOST_VALUE = 8  # above every table entry (tests/backend/test_cuda_products_plan.py)
MOST_NORM = 128  # of a token of x': rotate.cu


class Segment(ctypes.Structure):
    """As in multiply.cu."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_tiles", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("rows_per_block", ctypes.c_int),
        ("first_block", ctypes.c_int),
        ("out_offset", ctypes.c_int),
        ("decoder", ctypes.c_int),
        ("hash_unit", ctypes.c_uint32),
    )


class Problem(ctypes.Structure):
    """As in multiply.cu."""

    _fields_ = (
        ("segments", Segment * MOST_SEGMENTS),
        ("x", ctypes.c_void_p),
        ("x_scales", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("segment_count", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("batch", ctypes.c_int),
        ("y_stride", ctypes.c_int),
        ("out_type", ctypes.c_int),
        ("fixed_point", ctypes.c_float),
    )


@dataclass(frozen=True)
class Grid:
    """`blocks[i]` blocks take `rows_per_block[i]` row tiles each of segment i."""

    rows_per_block: tuple[int, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class DeviceLimits:
    multiprocessors: int
    shared_bytes: int  # that a block may have
    capability: tuple[int, int]

    @property
    def table_bytes(self) -> int:
        """32 copies of 1024 entries where they fit, half of it on smaller devices."""
        return MOST_TABLE_BYTES if self.shared_bytes >= 160 << 10 else MOST_TABLE_BYTES // 2

    def most_rows(self, batch: int) -> int:
        """Row tiles whose sums fit in a block's shared memory, beside the table."""
        return (self.shared_bytes - self.table_bytes) // _sum_bytes(batch)

    @property
    def overlap(self) -> bool:
        """Whether a kernel can start before the one before it has ended."""
        return self.capability >= (9, 0)


@lru_cache(maxsize=16)
def device_limits(device: int) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # torch's stubs lack it
        (properties.major, properties.minor),
    )


def batch_columns(tokens: int) -> int:
    """The batch that a kernel is compiled for: the next power of two."""
    return 1 << (tokens - 1).bit_length()


def _sum_bytes(batch: int) -> int:
    """Of a row tile."""
    return 64 * batch


@lru_cache(maxsize=4096)
def plan_grid(row_tiles: tuple[int, ...], costs: tuple[float, ...], multiprocessors: int, most_rows: int) -> Grid:
    """The least load per block with which the blocks of all segments fit on the device at once, one per multiprocessor;
    or twice, thrice, ... as many blocks where one may not take so many row tiles."""
    loads = sorted({rows * cost for tiles, cost in zip(row_tiles, costs, strict=True) for rows in range(1, tiles + 1)})
    for room in count(multiprocessors, multiprocessors):
        low, high = 0, len(loads)
        while low < high:
            middle = (low + high) // 2
            if sum(_cut(row_tiles, costs, loads[middle], most_rows).blocks) <= room:
                high = middle
            else:
                low = middle + 1
        if low < len(loads):
            return _cut(row_tiles, costs, loads[low], most_rows)
    raise AssertionError("unreachable: with enough blocks a row tile each will do")


def _cut(row_tiles: tuple[int, ...], costs: tuple[float, ...], load: float, most_rows: int) -> Grid:
    rows = tuple(max(1, min(most_rows, int(load / cost))) for cost in costs)
    return Grid(rows, tuple(-(-tiles // per_block) for tiles, per_block in zip(row_tiles, rows, strict=True)))


def fixed_point(columns: int) -> float:
    """The power of two by which sums become integers of 32 bits.

    |sum| <= |x'| |w'| <= MOST_NORM * MOST_VALUE * sqrt(K), so none overflows, in whatever order it is added up. At
    K = 4096 the unit is 2^-15: rounding the sums of 16 warps costs 2^-15 / sqrt(12) * 4, where a sum is 64 to 128 and
    the rounding of x' to float16 alone costs 64 * 2^-12 / sqrt(3).
    """
    return 2.0 ** (31 - ceil(log2(MOST_NORM * MOST_VALUE * sqrt(columns))))


def decode_cost(spec: DecoderSpec) -> float:
    """Relative time of a tile: look-ups, and the conflicts of a table without a copy per bank."""
    copies = min(32, MOST_TABLE_BYTES // (4 << spec.index_bits))
    conflicts = {32: 1.0, 16: 2.0, 8: 3.1, 4: 3.5, 2: 3.6, 1: 3.6}[copies]
    return 8 / spec.values * (conflicts + (1 if spec.hashed else 0.5)) + 4


def source_for(decoders: Sequence[DecoderSpec]) -> str:
    """One translation unit: every decoder of the kernel's set, then the kernel."""
    return with_decoders(SOURCE, tuple(decoders))


def kernel_macros(limits: DeviceLimits, batch: int) -> dict[str, int]:
    """The compile-time constants of multiply.cu, beside the decoders."""
    return {"THREADS": THREADS, "TABLE_BYTES": limits.table_bytes, "BATCH": batch}


def multiply(x: Rotated, tokens: int, members: Sequence[PackedLinear], dtype: torch.dtype) -> torch.Tensor:
    """[tokens, sum of out_features] of `dtype`: every member's product, side by side. Codes are in the chunk layout.

    Raises UnsupportedError for another layout.
    """
    check_layout(members)
    device = x.values.device
    limits = device_limits(device.index or 0)
    batch = len(x.values)
    specs = tuple(_spec_of(member.spec) for member in members)
    chunks = members[0].codes.shape[1]
    kernel, indices = _kernel_of(specs, batch, device.index or 0)
    row_tiles = tuple(len(member.codes) for member in members)
    costs = tuple(decode_cost(spec) for spec in specs)
    grid = plan_grid(row_tiles, costs, limits.multiprocessors, limits.most_rows(batch))
    y = torch.empty(tokens, sum(member.out_features for member in members), dtype=dtype, device=device)
    problem = Problem(
        x=x.values.data_ptr(),
        x_scales=x.scales.data_ptr(),
        y=y.data_ptr(),
        segment_count=len(members),
        chunks=chunks,
        batch=tokens,
        y_stride=y.shape[1],
        out_type=TYPES[dtype],
        fixed_point=fixed_point(members[0].in_features),
    )
    first, offset = 0, 0
    for i, (member, spec) in enumerate(zip(members, specs, strict=True)):
        problem.segments[i] = Segment(
            codes=member.codes.data_ptr(),
            entries=entries(member.spec, device).data_ptr(),
            scales=member.scales.data_ptr(),
            row_tiles=len(member.codes),
            rows=member.out_features,
            rows_per_block=grid.rows_per_block[i],
            first_block=first,
            out_offset=offset,
            decoder=indices[i],
            hash_unit=spec.hash_unit(limits.table_bytes),
        )
        first += grid.blocks[i]
        offset += member.out_features
    room = limits.table_bytes + max(grid.rows_per_block) * _sum_bytes(batch)
    stream = torch.cuda.current_stream(device).cuda_stream
    launch(kernel, stream, first, THREADS, room, [problem], overlap=limits.overlap)
    return y


@cache
def _kernel_of(specs: tuple[DecoderSpec, ...], batch: int, device: int) -> tuple[Any, tuple[int, ...]]:
    """The kernel of a launch over such segments, and the index of each one's decoder in it: the same ever after."""
    limits, decoders = device_limits(device), _sets(batch, device).serving(specs)
    kernel = load_kernel(source_for(decoders), "multiply", kernel_macros(limits, batch), device, limits.shared_bytes)
    return kernel, tuple(map(decoders.index, specs))


@cache
def _sets(batch: int, device: int) -> DecoderSets:
    return DecoderSets()


def _spec_of(name: str) -> DecoderSpec:
    spec = decoder_spec(name)
    assert spec is not None, "supports() said no"
    return spec
