"""More tokens than a fused product takes: matrices decoded, the vendor's matrix product."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from qpalette.backends.cuda.compiler import KernelLaunch, load_kernel
from qpalette.backends.cuda.decoder import COMMON_SOURCE
from qpalette.backends.cuda.layout import CHUNK
from qpalette.backends.cuda.rotate import TYPES
from qpalette.backends.cuda.segments import (
    MOST_SEGMENTS,
    THREADS,
    DeviceLimits,
    Rows,
    block_by_block,
    device_limits,
    prepare_segments,
)
from qpalette.core.records import TILE
from qpalette.runtime import PackedLinear

SOURCE = Path(__file__).with_name("unpack.cu").read_text(encoding="utf-8")
RESCALE_SOURCE = COMMON_SOURCE + Path(__file__).with_name("rescale.cu").read_text(encoding="utf-8")
RESCALE_MACROS = {"THREADS": 512, "MOST_SEGMENTS": MOST_SEGMENTS}
SLAB_BYTES = 128 << 20  # of decoded rows at a time


class Outputs(ctypes.Structure):
    """As in rescale.cu."""

    _fields_ = (
        ("y", ctypes.c_void_p * MOST_SEGMENTS),
        ("y_stride", ctypes.c_int * MOST_SEGMENTS),
        ("rows", ctypes.c_int * MOST_SEGMENTS),
        ("x_scales", ctypes.c_void_p),
        ("count", ctypes.c_int),
    )


def unpack_macros(limits: DeviceLimits, in_int8: bool = False) -> dict[str, int]:
    """The compile-time constants of unpack.cu, beside the decoders."""
    return {"THREADS": THREADS, "TABLE_BYTES": limits.table_bytes, "IN_INT8": int(in_int8)}


class UnpackLaunch:
    """W', row scales applied, [rows, columns of all chunks] of float16 or bfloat16, or without them, of int8; the
    columns in the order of `rotate` for batch None, one matrix's whole tiles below the other's."""

    def __init__(self, rows: Sequence[Rows], dtype: torch.dtype) -> None:
        limits, in_int8 = device_limits(rows[0].packed.codes.device.index or 0), dtype == torch.int8
        macros = tuple(unpack_macros(limits, in_int8).items())
        columns = rows[0].packed.codes.shape[1] * CHUNK * TILE
        offsets = [columns * height for height in accumulate((part.height for part in rows), initial=0)]
        planner = block_by_block(limits, max(part.tiles for part in rows))
        segments = prepare_segments(rows, offsets, SOURCE, "unpack", macros, limits.table_bytes, planner, in_int8)
        self._problem = segments.problem
        self._problem.out_type, self._problem.y_stride = TYPES.get(dtype, 0), columns
        self._launch = KernelLaunch(segments.kernel, segments.blocks, THREADS, limits.table_bytes, [self._problem])

    def start(self, out: int, stream: int) -> None:
        self._problem.y = out
        self._launch.start(stream)


@dataclass(frozen=True)
class Part:
    """Rows of member `index`, and where the first of them is in a slab."""

    index: int
    source: Rows
    place: int


def cut_into_slabs(members: Sequence[PackedLinear], most_tiles: int) -> list[list[Part]]:
    """Row tiles of all members, in order, at most `most_tiles` (and MOST_SEGMENTS matrices) in each slab; a matrix is
    cut only where it is higher than a slab."""
    slabs: list[list[Part]] = [[]]
    left = most_tiles
    for index, member in enumerate(members):
        tiles = len(member.codes)
        for first in range(0, tiles, most_tiles):
            count = min(most_tiles, tiles - first)
            if count > left or len(slabs[-1]) == MOST_SEGMENTS:
                slabs.append([])
                left = most_tiles
            place = slabs[-1][-1].place + slabs[-1][-1].source.height if slabs[-1] else 0
            slabs[-1].append(Part(index, Rows(member, first, count), place))
            left -= count
    return slabs


class RescaleLaunch:
    """y *= x_scales where they are not 1, in place, float16, of at most MOST_SEGMENTS matrices."""

    def __init__(self, device: torch.device) -> None:
        kernel = load_kernel(RESCALE_SOURCE, "rescale", RESCALE_MACROS, device.index or 0)
        self._outputs = Outputs()
        self._launch = KernelLaunch(kernel, 1, RESCALE_MACROS["THREADS"], 0, [self._outputs])

    def start(self, x_scales: torch.Tensor, products: Sequence[torch.Tensor], stream: int) -> None:
        """`products` [tokens, M] with contiguous rows."""
        outputs = self._outputs
        outputs.x_scales, outputs.count = x_scales.data_ptr(), len(products)
        for i, y in enumerate(products):
            outputs.y[i], outputs.y_stride[i], outputs.rows[i] = y.data_ptr(), y.stride(0), y.shape[1]
        self._launch.grid = (len(x_scales), 1, 1)
        self._launch.start(stream)
