"""Products with packed matrices on a CUDA device: how the work is cut, and the launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qpalette.backends.cuda.decoder import SOURCE as DECODER_SOURCE
from qpalette.backends.cuda.decoder import DecoderSpec, decoder_spec, entries
from qpalette.backends.cuda.rotate import TYPES, Rotated
from qpalette.kernels import PackedLinear
from qpalette.kernels.nvrtc import launch, load_kernel

SOURCE = Path(__file__).with_name("multiply.cu").read_text()
MOST_SEGMENTS = 8
MOST_BATCH = 16
THREADS = 512
WARPS = THREADS // 32
SPLITS = (1, 2, 4, 8)


class Segment(ctypes.Structure):
    """As in multiply.cu."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_tiles", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("rows_per_block", ctypes.c_int),
        ("first_cluster", ctypes.c_int),
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
    )


@dataclass(frozen=True)
class Grid:
    """`split` blocks share the columns of `rows_per_block[i]` row tiles of segment i."""

    split: int
    rows_per_block: tuple[int, ...]
    clusters: tuple[int, ...]


@dataclass(frozen=True)
class DeviceLimits:
    multiprocessors: int
    shared_bytes: int  # that a block may have
    capability: tuple[int, int]

    @property
    def table_bytes(self) -> int:
        """32 copies of 1024 entries where they fit, half of it on smaller devices."""
        return 1 << 17 if self.shared_bytes >= 160 << 10 else 1 << 16

    @property
    def clusters(self) -> bool:
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


@lru_cache(maxsize=4096)
def plan_grid(row_tiles: tuple[int, ...], costs: tuple[float, ...], chunks: int, limits: DeviceLimits) -> Grid:
    """The cut that leaves the busiest multiprocessor the least to decode; of equals the one with the fewest shares."""
    best: tuple[float, Grid] | None = None
    for split in SPLITS:
        if split > 1 and (not limits.clusters or split > chunks):
            break
        slots = limits.multiprocessors // split
        if slots < len(row_tiles):
            break
        grid = _fit(row_tiles, costs, slots, split)
        width = -(-chunks // split)
        busiest = max(rows * cost for rows, cost in zip(grid.rows_per_block, costs, strict=True)) * width
        busiest *= 1 + 0.02 * (split - 1)  # the exchange at the end
        if best is None or busiest < best[0]:
            best = busiest, grid
    if best is None:  # more segments than multiprocessors
        return _fit(row_tiles, costs, sum(row_tiles), 1)
    return best[1]


def _fit(row_tiles: tuple[int, ...], costs: tuple[float, ...], slots: int, split: int) -> Grid:
    """The least load per cluster with which all segments fit in `slots` clusters."""
    loads = sorted({rows * cost for tiles, cost in zip(row_tiles, costs, strict=True) for rows in range(1, tiles + 1)})
    low, high = 0, len(loads) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(_clusters(row_tiles, costs, loads[middle])) <= slots:
            high = middle
        else:
            low = middle + 1
    load = loads[low]
    rows = tuple(max(1, int(load / cost)) for cost in costs)
    return Grid(split, rows, tuple(_clusters(row_tiles, costs, load)))


def _clusters(row_tiles: tuple[int, ...], costs: tuple[float, ...], load: float) -> list[int]:
    return [-(-tiles // max(1, int(load / cost))) for tiles, cost in zip(row_tiles, costs, strict=True)]


def decode_cost(spec: DecoderSpec) -> float:
    """Relative time of a tile: look-ups, and the conflicts of a table without a copy per bank."""
    copies = min(32, (1 << 17) // (4 << spec.index_bits))
    conflicts = {32: 1.0, 16: 1.5, 8: 2.1, 4: 2.7, 2: 3.1, 1: 3.4}[copies]
    return 8 / spec.values * (conflicts + (1 if spec.hashed else 0.5)) + 4


def source_for(decoders: Sequence[DecoderSpec]) -> str:
    """One translation unit: every decoder of the launch, then the kernel."""
    names = ", ".join(decoder.type_name for decoder in decoders)
    return f"#define DECODERS {names}\n{DECODER_SOURCE}\n{SOURCE}"


def shared_bytes(table_bytes: int, batch: int, split: int) -> int:
    sums = 128 * (2 if batch > 8 else 1)
    return table_bytes + 4 * WARPS * 2 * sums + (4 * WARPS * 16 * batch if split > 1 else 0)


def multiply(x: Rotated, tokens: int, members: Sequence[PackedLinear], dtype: torch.dtype) -> torch.Tensor:
    """[tokens, sum of out_features] of `dtype`: every member's product, side by side. Codes are in the chunk layout."""
    device = x.values.device
    limits = device_limits(device.index or 0)
    batch = len(x.values)
    specs = [_spec_of(member.spec) for member in members]
    decoders = list(dict.fromkeys(specs))
    chunks = members[0].codes.shape[1]
    grid = plan_grid(
        tuple(len(member.codes) for member in members), tuple(decode_cost(spec) for spec in specs), chunks, limits
    )
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
            first_cluster=first,
            out_offset=offset,
            decoder=decoders.index(spec),
            hash_unit=spec.hash_unit(limits.table_bytes),
        )
        first += grid.clusters[i]
        offset += member.out_features
    macros = {"THREADS": THREADS, "TABLE_BYTES": limits.table_bytes, "BATCH": batch, "SPLIT": grid.split}
    room = shared_bytes(limits.table_bytes, batch, grid.split)
    kernel = load_kernel(source_for(decoders), "multiply", macros, device.index or 0, room)
    stream = torch.cuda.current_stream(device).cuda_stream
    launch(kernel, stream, first * grid.split, THREADS, room, [problem], grid.split, overlap=limits.clusters)
    return y


def _spec_of(name: str) -> DecoderSpec:
    spec = decoder_spec(name)
    assert spec is not None, "supports() said no"
    return spec
