"""Products of many tokens with packed matrices on a CUDA device: decoded once for up to 64 of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from qpalette.backends.cuda.compiler import KernelLaunch, clusters_at_once
from qpalette.backends.cuda.decoder import DecoderSpec
from qpalette.backends.cuda.layout import CHUNK
from qpalette.backends.cuda.multiply import MOST_BATCH, batch_columns, fixed_point, sum_bytes
from qpalette.backends.cuda.rotate import TYPES
from qpalette.backends.cuda.segments import (
    DeviceLimits,
    Grid,
    all_rows,
    device_limits,
    plan_grid,
    prepare_segments,
    with_segments,
)
from qpalette.core.records import TILE
from qpalette.runtime import PackedLinear

TILES_SOURCE = Path(__file__).with_name("tiles.cuh").read_text(encoding="utf-8")
SOURCE = TILES_SOURCE + Path(__file__).with_name("tiles.cu").read_text(encoding="utf-8")
CONTROL_BYTES = 128
CLUSTERS = (1, 2, 4, 8)  # blocks that share rows; 8 is the most that every device with clusters has
LEAST_TABLE_BYTES = 1 << 16  # the largest table, once
# By columns: threads of a block, row tiles of a warp, the table's bytes at most.
CUTS = {
    32: (256, 2, 1 << 17),
    48: (256, 2, 1 << 17),
    64: (256, 2, 1 << 17),
}
COLUMNS = tuple(CUTS)  # that kernels are compiled for
# Estimates, not measured, in cycles of a multiprocessor: what a row tile and a chunk take, for each unit of decode_cost
# and for each column; bytes of x' from the second-level cache; what a block takes beside, and one of a cluster; how
# long a chunk is on its way.
DECODE_CYCLES = 13
COLUMN_CYCLES = 1.5
BYTES_PER_CYCLE = 24
BLOCK_CYCLES = 2000
CLUSTER_CYCLES = 1000
FETCH_CYCLES = 1500
ENOUGH_WARPS = 8  # to keep a multiprocessor busy


@dataclass(frozen=True)
class Shape:
    """The compile-time constants of tiles.cuh, beside the decoders."""

    columns: int  # a multiple of 8
    threads: int
    row_tiles: int  # of a warp
    stages: int  # chunks of x' in shared memory
    table_bytes: int

    @property
    def macros(self) -> dict[str, int]:
        return {
            "THREADS": self.threads,
            "TABLE_BYTES": self.table_bytes,
            "BATCH": self.columns,
            "ROW_TILES": self.row_tiles,
            "STAGES": self.stages,
        }

    @property
    def stage_bytes(self) -> int:
        return 2 * TILE * CHUNK * self.columns

    @property
    def room(self) -> int:
        """Shared memory of a block."""
        return self.table_bytes + CONTROL_BYTES + self.stages * self.stage_bytes

    @property
    def most_rows(self) -> int:
        """Row tiles of a block: a warp has a group of them at most, and their sums lie in the place of x'."""
        fitting = self.stages * self.stage_bytes // (self.row_tiles * sum_bytes(self.columns))
        return min(self.threads // 32, fitting) * self.row_tiles

    def parts(self, groups: int) -> int:
        """Of a block's chunks, where its rows are so many groups: each has its warps, and a stage of x' at least."""
        return min(self.threads // 32 // groups, self.stages)

    def cycles(self, chunks: int, row_tiles: int, cost: float) -> float:
        """Of a block of so many chunks and row tiles. A part with one stage waits for each chunk but its first."""
        groups = -(-row_tiles // self.row_tiles)
        parts = min(self.parts(groups), chunks)
        turns, item = -(-chunks // parts), self.row_tiles * (DECODE_CYCLES * cost + COLUMN_CYCLES * self.columns)
        waiting = FETCH_CYCLES * (turns - 1) if self.stages // parts == 1 else 0
        return turns * max(groups * parts, ENOUGH_WARPS) * item + waiting


def shape_of(limits: DeviceLimits, columns: int) -> Shape:
    """For so many columns: chunks of x' in all that the table leaves, one of fewer copies where that is one chunk."""
    threads, row_tiles, table_bytes = CUTS[columns]
    shape = Shape(columns, threads, row_tiles, 1, min(table_bytes, limits.table_bytes))
    if replace(shape, stages=2).room > limits.shared_bytes:
        shape = replace(shape, table_bytes=LEAST_TABLE_BYTES)
    return replace(shape, stages=(limits.shared_bytes - shape.room) // shape.stage_bytes + 1)


def most_columns(limits: DeviceLimits) -> int:
    """That are multiplied at once: their x' and their sums want room."""
    return COLUMNS[-1] if limits.shared_bytes >= 160 << 10 else COLUMNS[0]


def columns_of(tokens: int, limits: DeviceLimits) -> tuple[int, int]:
    """(lots, columns of each): the fewest lots of tokens, alike, and the least of the numbers of columns that kernels
    are compiled for."""
    if tokens <= MOST_BATCH:
        return 1, batch_columns(tokens)
    lots = -(-tokens // most_columns(limits))
    return lots, min(columns for columns in COLUMNS if lots * columns >= tokens)


def source_for(decoders: Sequence[DecoderSpec]) -> str:
    """One translation unit: every decoder of the kernel's set, then the kernel."""
    return with_segments(SOURCE, decoders)


@lru_cache(maxsize=4096)
def plan_clusters(
    row_tiles: tuple[int, ...],
    costs: tuple[float, ...],
    chunks: int,
    at_once: tuple[tuple[int, int], ...],
    shape: Shape,
) -> Grid:
    """The cut that takes the least time, by the rates above. `at_once`: (blocks of a cluster, how many clusters a lot
    of tokens has at once). The more blocks share rows, the less each reads of x', and the more sums are exchanged."""
    grids = [
        (replace(plan_grid(row_tiles, costs, clusters, shape.most_rows), cluster=cluster), clusters)
        for cluster, clusters in at_once
    ]

    def cycles(grid: Grid, clusters: int) -> float:
        own = -(-chunks // grid.cluster)
        reading = own * shape.stage_bytes / BYTES_PER_CYCLE
        decoding = max(map(partial(shape.cycles, own), grid.rows_per_block, costs))
        waves = -(-sum(grid.blocks) // clusters)
        return waves * (max(decoding, reading) + BLOCK_CYCLES + CLUSTER_CYCLES * (grid.cluster > 1))

    return min(grids, key=lambda found: cycles(*found))[0]


class TileLaunch:
    """y = W' x' of at most MOST_SEGMENTS matrices in the chunk layout, for one number of tokens and one type of y, as
    ProductLaunch is for fewer."""

    def __init__(
        self, members: Sequence[PackedLinear], tokens: int, dtype: torch.dtype, first: int, width: int
    ) -> None:
        limits = device_limits(members[0].codes.device.index or 0)
        lots, columns = columns_of(tokens, limits)
        shape, chunks = shape_of(limits, columns), members[0].codes.shape[1]

        def planner(kernel: Any, row_tiles: tuple[int, ...], costs: tuple[float, ...]) -> Grid:
            there = clusters_there(kernel, limits, shape)
            at_once = tuple((cluster, max(1, count // lots)) for cluster, count in there.items())
            return plan_clusters(row_tiles, costs, chunks, at_once, shape)

        offsets = list(accumulate((member.out_features for member in members), initial=first))
        rows, macros = [all_rows(member) for member in members], tuple(shape.macros.items())
        segments = prepare_segments(rows, offsets, SOURCE, "multiply_tiles", macros, shape.table_bytes, planner)
        self._problem = problem = segments.problem
        problem.batch, problem.out_type, problem.y_stride = tokens, TYPES[dtype], width
        problem.fixed_point = fixed_point(members[0].in_features)
        self.grid = segments.grid
        blocks = (segments.blocks, lots)
        self._launch = KernelLaunch(
            segments.kernel, blocks, shape.threads, shape.room, [problem], limits.overlap, segments.grid.cluster
        )

    def start(self, x: int, x_scales: int, y: int, stream: int) -> None:
        """Addresses of x' and its divisors, as `rotate` leaves them, and of the results."""
        problem = self._problem
        problem.x, problem.x_scales, problem.y = x, x_scales, y
        self._launch.start(stream)


def clusters_there(kernel: Any, limits: DeviceLimits, shape: Shape) -> Mapping[int, int]:
    """How many clusters of a number of blocks are there at once."""
    found = {1: limits.multiprocessors}
    if limits.capability >= (9, 0):
        for cluster in CLUSTERS[1:]:
            if count := clusters_at_once(int(kernel.handle), cluster, shape.threads, shape.room):
                found[cluster] = count
    return found
