"""Products of a few tokens with packed matrices on a CUDA device: decoded once for up to 32 of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import ceil, log2, sqrt
from pathlib import Path

import torch

from qpalette.backends.cuda.compiler import KernelLaunch
from qpalette.backends.cuda.decoder import DecoderSpec
from qpalette.backends.cuda.rotate import TYPES
from qpalette.backends.cuda.segments import (
    THREADS,
    DeviceLimits,
    all_rows,
    block_by_block,
    device_limits,
    prepare_segments,
    with_segments,
)
from qpalette.runtime import PackedLinear

TILES_SOURCE = Path(__file__).with_name("multiply.cuh").read_text(encoding="utf-8")
SOURCE = TILES_SOURCE + Path(__file__).with_name("multiply.cu").read_text(encoding="utf-8")
COLUMNS_OF_A_CHUNK = 16  # that a warp's registers hold
COLUMNS = (1, 2, 4, 8, 16, 24, 32)  # that kernels are compiled for
MOST_VALUE = 8  # above every table entry (tests/backend/test_cuda_products_plan.py)
MOST_NORM = 128  # of a token of x': rotate.cu


def columns_of(tokens: int) -> tuple[int, int]:
    """(lots, columns of each): the fewest lots of tokens, alike, and the least of COLUMNS that hold them."""
    lots = -(-tokens // COLUMNS[-1])
    return lots, min(columns for columns in COLUMNS if lots * columns >= tokens)


def cuts_of(columns: int) -> int:
    """Of a chunk, each a warp's: CUTS of multiply.cuh."""
    return -(-columns // COLUMNS_OF_A_CHUNK)


def most_rows(limits: DeviceLimits, batch: int) -> int:
    """Row tiles whose sums fit in a block's shared memory, beside the table."""
    return (limits.shared_bytes - limits.table_bytes) // sum_bytes(batch)


def sum_bytes(batch: int) -> int:
    """Of a row tile."""
    return 64 * batch


def fixed_point(columns: int) -> float:
    """The power of two by which sums become integers of 32 bits.

    |sum| <= |x'| |w'| <= MOST_NORM * MOST_VALUE * sqrt(K), so none overflows, in whatever order it is added up. At
    K = 4096 the unit is 2^-15: rounding the sums of 16 warps costs 2^-15 / sqrt(12) * 4, where a sum is 64 to 128 and
    the rounding of x' to float16 alone costs 64 * 2^-12 / sqrt(3).
    """
    return 2.0 ** (31 - ceil(log2(MOST_NORM * MOST_VALUE * sqrt(columns))))


def kernel_macros(limits: DeviceLimits, batch: int) -> dict[str, int]:
    """The compile-time constants of multiply.cuh, beside the decoders; x' takes 32 of a thread's registers, 64 at a
    batch of 16 and 32."""
    return {"THREADS": THREADS, "TABLE_BYTES": limits.table_bytes, "BATCH": batch}


def source_for(decoders: Sequence[DecoderSpec]) -> str:
    """One translation unit: every decoder of the kernel's set, then the kernel."""
    return with_segments(SOURCE, decoders)


class ProductLaunch:
    """y = W' x' of at most MOST_SEGMENTS matrices in the chunk layout, for one number of tokens and one type of y: side
    by side from column `first` on, in rows of `width`."""

    zero_bytes = 0  # that it wants

    def __init__(
        self, members: Sequence[PackedLinear], tokens: int, dtype: torch.dtype, first: int, width: int
    ) -> None:
        limits, (lots, batch) = device_limits(members[0].codes.device.index or 0), columns_of(tokens)
        macros = tuple(kernel_macros(limits, batch).items())
        offsets = list(accumulate((member.out_features for member in members), initial=first))
        rows = [all_rows(member) for member in members]
        planner = block_by_block(limits, most_rows(limits, batch), lots)
        segments = prepare_segments(rows, offsets, SOURCE, "multiply", macros, limits.table_bytes, planner)
        self._problem = problem = segments.problem
        problem.batch, problem.out_type, problem.y_stride = tokens, TYPES[dtype], width
        problem.fixed_point = fixed_point(members[0].in_features)
        room = limits.table_bytes + max(segments.grid.rows_per_block) * sum_bytes(batch)
        grid = (segments.blocks, lots)
        self._launch = KernelLaunch(segments.kernel, grid, THREADS, room, [problem], limits.overlap)

    def start(self, x: int, x_scales: int, y: int, stream: int, zeros: int = 0) -> None:
        """Addresses of x' and its divisors, as `rotate` leaves them, and of the results."""
        problem = self._problem
        problem.x, problem.x_scales, problem.y = x, x_scales, y
        self._launch.start(stream)
