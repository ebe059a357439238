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
THREADS = 512  # of 128 registers; x' takes 32 of them, 64 above a batch of 8
MOST_TABLE_BYTES = 1 << 17
MOST_SUM_BYTES = 96 << 10
SUM_GRAIN = 32 << 10  # of the sums of two row tiles at a batch of 16


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

    @property
    def sum_bytes(self) -> int:
        """For the warps' sums, beside the table: a round takes as many row tiles as fit."""
        left = (self.shared_bytes - self.table_bytes) // SUM_GRAIN * SUM_GRAIN
        return min(MOST_SUM_BYTES, left)

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


@lru_cache(maxsize=4096)
def plan_grid(row_tiles: tuple[int, ...], costs: tuple[float, ...], multiprocessors: int) -> Grid:
    """The least load per block with which all segments fit on the device at once, a block per multiprocessor."""
    loads = sorted({rows * cost for tiles, cost in zip(row_tiles, costs, strict=True) for rows in range(1, tiles + 1)})
    low, high = 0, len(loads) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(_cut(row_tiles, costs, loads[middle]).blocks) <= multiprocessors:
            high = middle
        else:
            low = middle + 1
    return _cut(row_tiles, costs, loads[low])


def _cut(row_tiles: tuple[int, ...], costs: tuple[float, ...], load: float) -> Grid:
    rows = tuple(max(1, int(load / cost)) for cost in costs)
    return Grid(rows, tuple(-(-tiles // per_block) for tiles, per_block in zip(row_tiles, rows, strict=True)))


def decode_cost(spec: DecoderSpec) -> float:
    """Relative time of a tile: look-ups, and the conflicts of a table without a copy per bank."""
    copies = min(32, MOST_TABLE_BYTES // (4 << spec.index_bits))
    conflicts = {32: 1.0, 16: 1.5, 8: 2.1, 4: 2.7, 2: 3.1, 1: 3.4}[copies]
    return 8 / spec.values * (conflicts + (1 if spec.hashed else 0.5)) + 4


def source_for(decoders: Sequence[DecoderSpec]) -> str:
    """One translation unit: every decoder of the launch, then the kernel."""
    names = ", ".join(decoder.type_name for decoder in decoders)
    return f"#define DECODERS {names}\n{DECODER_SOURCE}\n{SOURCE}"


def kernel_macros(limits: DeviceLimits, batch: int) -> dict[str, int]:
    """The compile-time constants of multiply.cu, beside the decoders."""
    return {"THREADS": THREADS, "TABLE_BYTES": limits.table_bytes, "SUM_BYTES": limits.sum_bytes, "BATCH": batch}


def multiply(x: Rotated, tokens: int, members: Sequence[PackedLinear], dtype: torch.dtype) -> torch.Tensor:
    """[tokens, sum of out_features] of `dtype`: every member's product, side by side. Codes are in the chunk layout."""
    device = x.values.device
    limits = device_limits(device.index or 0)
    batch = len(x.values)
    specs = [_spec_of(member.spec) for member in members]
    decoders = list(dict.fromkeys(specs))
    chunks = members[0].codes.shape[1]
    row_tiles = tuple(len(member.codes) for member in members)
    grid = plan_grid(row_tiles, tuple(decode_cost(spec) for spec in specs), limits.multiprocessors)
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
            first_block=first,
            out_offset=offset,
            decoder=decoders.index(spec),
            hash_unit=spec.hash_unit(limits.table_bytes),
        )
        first += grid.blocks[i]
        offset += member.out_features
    room = limits.table_bytes + limits.sum_bytes
    kernel = load_kernel(source_for(decoders), "multiply", kernel_macros(limits, batch), device.index or 0, room)
    stream = torch.cuda.current_stream(device).cuda_stream
    launch(kernel, stream, first, THREADS, room, [problem], overlap=limits.overlap)
    return y


def _spec_of(name: str) -> DecoderSpec:
    spec = decoder_spec(name)
    assert spec is not None, "supports() said no"
    return spec
