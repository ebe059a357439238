"""Launches over several packed matrices on a CUDA device: what a kernel is told of them, and how the work is cut."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qpalette.backends.cuda.compiler import load_kernel
from qpalette.backends.cuda.decoder import DecoderSpec, decoder_spec, entries, with_decoders
from qpalette.backends.cuda.decoder_sets import DecoderSets
from qpalette.core.records import TILE
from qpalette.runtime import PackedLinear

SOURCE = Path(__file__).with_name("segments.cuh").read_text(encoding="utf-8")
MOST_SEGMENTS = 8
THREADS = 512  # of 128 registers
MOST_TABLE_BYTES = 1 << 17


class Segment(ctypes.Structure):
    """As in segments.cuh."""

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
        ("first_tile", ctypes.c_int),
    )


class Problem(ctypes.Structure):
    """As in segments.cuh."""

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
        ("run", ctypes.c_int),
        ("sum_tiles", ctypes.c_int),
        ("sums", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    )


class Rows(NamedTuple):
    """Some row tiles of a matrix in the chunk layout, from `first` on."""

    packed: PackedLinear
    first: int
    tiles: int

    @property
    def first_row(self) -> int:
        return TILE * self.first

    @property
    def rows(self) -> int:
        return min(TILE * self.tiles, self.packed.out_features - self.first_row)

    @property
    def height(self) -> int:
        """Of its whole tiles."""
        return TILE * self.tiles

    @property
    def spec(self) -> DecoderSpec:
        spec = decoder_spec(self.packed.spec)
        assert spec is not None, "supports() said no"
        return spec


def all_rows(packed: PackedLinear) -> Rows:
    return Rows(packed, 0, len(packed.codes))


@dataclass(frozen=True)
class Grid:
    """`blocks[i]` blocks take `rows_per_block[i]` row tiles each of segment i."""

    rows_per_block: tuple[int, ...]
    blocks: tuple[int, ...]


# Of a kernel, the row tiles of each segment and the cost of each one's.
Planner = Callable[[Any, tuple[int, ...], tuple[float, ...]], Grid]


@dataclass(frozen=True)
class DeviceLimits:
    multiprocessors: int
    shared_bytes: int  # that a block may have
    capability: tuple[int, int]

    @property
    def table_bytes(self) -> int:
        """32 copies of 1024 entries where they fit, half of it on smaller devices."""
        return MOST_TABLE_BYTES if self.shared_bytes >= 160 << 10 else MOST_TABLE_BYTES // 2

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


def block_by_block(limits: DeviceLimits, most_rows: int, lots: int = 1) -> Planner:
    """A block of one multiprocessor has whole rows, at most so many tiles; the blocks of all lots of tokens are there
    at once: four lots of 32 tokens through 4096 x 4096 took 28 us, and 39 where each lot had every multiprocessor
    (tiles.py, tcq2-3.25, H200)."""
    multiprocessors = max(1, limits.multiprocessors // lots)
    return lambda kernel, row_tiles, costs: plan_grid(row_tiles, costs, multiprocessors, most_rows)


def _cut(row_tiles: tuple[int, ...], costs: tuple[float, ...], load: float, most_rows: int) -> Grid:
    rows = tuple(max(1, min(most_rows, int(load / cost))) for cost in costs)
    return Grid(rows, tuple(-(-tiles // per_block) for tiles, per_block in zip(row_tiles, rows, strict=True)))


def decode_cost(spec: DecoderSpec) -> float:
    """Relative time of a tile: look-ups, and the conflicts of a table without a copy per bank."""
    copies = min(32, MOST_TABLE_BYTES // (4 << spec.index_bits))
    conflicts = {32: 1.0, 16: 2.0, 8: 3.1, 4: 3.5, 2: 3.6, 1: 3.6}[copies]
    return 8 / spec.values * (conflicts + (1 if spec.hashed else 0.5)) + 4


@dataclass(frozen=True)
class Segments:
    """What a kernel of multiply.cu or unpack.cu is told of `rows`, but for where it reads x and writes."""

    rows: tuple[Rows, ...]
    kernel: Any
    problem: Problem
    grid: Grid

    @property
    def blocks(self) -> int:
        return sum(self.grid.blocks)


def prepare_segments(
    rows: Sequence[Rows],
    offsets: Sequence[int],
    source: str,
    name: str,
    macros: tuple[tuple[str, int], ...],
    table_bytes: int,
    planner: Planner,
    in_int8: bool = False,
) -> Segments:
    """Of at most MOST_SEGMENTS matrices that read one input, for the kernel `name` of `source`: where each writes, in
    elements of y, how their rows are cut, and what is in their tables."""
    device = rows[0].packed.codes.device
    specs = tuple(part.spec for part in rows)
    kernel, indices = kernel_of(source, name, macros, specs, device.index or 0)
    grid = planner(kernel, tuple(part.tiles for part in rows), tuple(map(decode_cost, specs)))
    problem = Problem(segment_count=len(rows), chunks=rows[0].packed.codes.shape[1])
    first_block = first_tile = 0
    for i, (part, spec) in enumerate(zip(rows, specs, strict=True)):
        packed = part.packed
        problem.segments[i] = Segment(
            codes=packed.codes[part.first :].data_ptr(),
            entries=entries(packed.spec, device, in_int8).data_ptr(),
            scales=packed.scales[part.first_row :].data_ptr(),
            row_tiles=part.tiles,
            rows=part.rows,
            rows_per_block=grid.rows_per_block[i],
            first_block=first_block,
            out_offset=offsets[i],
            decoder=indices[i],
            hash_unit=spec.hash_unit(table_bytes),
            first_tile=first_tile,
        )
        first_tile += part.tiles
        first_block += grid.blocks[i]
    return Segments(tuple(rows), kernel, problem, grid)


@cache
def kernel_of(
    source: str, name: str, macros: tuple[tuple[str, int], ...], specs: tuple[DecoderSpec, ...], device: int
) -> tuple[Any, tuple[int, ...]]:
    """The kernel of a launch over such segments, and the index of each one's decoder in it: the same ever after."""
    decoders = _sets(name, macros, device).serving(specs)
    shared_bytes = device_limits(device).shared_bytes
    kernel = load_kernel(with_segments(source, decoders), name, dict(macros), device, shared_bytes)
    return kernel, tuple(map(decoders.index, specs))


@cache
def _sets(name: str, macros: tuple[tuple[str, int], ...], device: int) -> DecoderSets:
    return DecoderSets()


def with_segments(source: str, decoders: Sequence[DecoderSpec]) -> str:
    """One translation unit: every decoder of the kernel's set, then the kernel."""
    return with_decoders(SOURCE + source, tuple(decoders))
