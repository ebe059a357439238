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
COLUMNS = (32, 48, 64)  # that kernels are compiled for
CONTROL_BYTES = 128
CLUSTERS = (1, 2, 4, 8)  # blocks that share rows; 8 is the most that every device with clusters has
LEAST_TABLE_BYTES = 1 << 16  # the largest table, once
LEAST_ROWS = 8  # row tiles of a block
# Estimates, not measured, in cycles of a multiprocessor: what a row tile and a chunk take, for each unit of decode_cost
# and for each column; bytes of x' from the second-level cache; what a block takes beside, and one of a cluster.
DECODE_CYCLES = 16
COLUMN_CYCLES = 1.5
BYTES_PER_CYCLE = 24
BLOCK_CYCLES = 2000
CLUSTER_CYCLES = 1000
ENOUGH_WARPS = 8  # to keep a multiprocessor busy


@dataclass(frozen=True)
class Shape:
    """The compile-time constants of tiles.cuh, beside the decoders."""

    columns: int  # a multiple of 8
    threads: int
    row_tiles: int  # of an item
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

    def room(self, row_tiles: int) -> int:
        """Shared memory of a block of so many."""
        groups = -(-row_tiles // self.row_tiles)
        sums = groups * self.row_tiles * sum_bytes(self.columns)
        return self.table_bytes + CONTROL_BYTES + self.stages * self.stage_bytes + sums

    def most_rows(self, limits: DeviceLimits) -> int:
        """Row tiles of a block."""
        groups = (limits.shared_bytes - self.room(0)) // (self.row_tiles * sum_bytes(self.columns))
        return groups * self.row_tiles

    def cycles(self, chunks: int, row_tiles: int, cost: float) -> float:
        """Of a block of so many chunks and row tiles: its warps take turns, and are at `stages` chunks at most."""
        groups = -(-row_tiles // self.row_tiles)
        warps = min(self.threads // 32, groups * self.stages)
        turns = -(-groups * chunks // warps)
        item = self.row_tiles * (DECODE_CYCLES * cost + COLUMN_CYCLES * self.columns)
        return turns * max(warps, ENOUGH_WARPS) * item


def shape_of(limits: DeviceLimits, columns: int) -> Shape:
    """For so many columns: a table of fewer copies where a block would have few rows, and then chunks of x'."""
    many = columns > 32
    shape = Shape(columns, 256 if many else 512, 2 if many else 1, 1, limits.table_bytes)
    if many or replace(shape, stages=2).most_rows(limits) < LEAST_ROWS:
        shape = replace(shape, table_bytes=LEAST_TABLE_BYTES)
    while (deeper := replace(shape, stages=shape.stages + 1)).most_rows(limits) >= LEAST_ROWS * min(2, shape.stages):
        shape = deeper
    return shape


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
    most_rows: int,
) -> Grid:
    """The cut that takes the least time, by the rates above. `at_once`: (blocks of a cluster, how many clusters a lot
    of tokens has at once). The more blocks share rows, the less each reads of x', and the more sums are exchanged."""
    grids = [
        (replace(plan_grid(row_tiles, costs, clusters, most_rows), cluster=cluster), clusters)
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
        most_rows = shape.most_rows(limits)

        def planner(kernel: Any, row_tiles: tuple[int, ...], costs: tuple[float, ...]) -> Grid:
            there = clusters_there(kernel, limits, shape)
            at_once = tuple((cluster, max(1, count // lots)) for cluster, count in there.items())
            return plan_clusters(row_tiles, costs, chunks, at_once, shape, most_rows)

        offsets = list(accumulate((member.out_features for member in members), initial=first))
        rows, macros = [all_rows(member) for member in members], tuple(shape.macros.items())
        segments = prepare_segments(rows, offsets, SOURCE, "multiply_tiles", macros, shape.table_bytes, planner)
        self._problem = problem = segments.problem
        problem.batch, problem.out_type, problem.y_stride = tokens, TYPES[dtype], width
        problem.fixed_point = fixed_point(members[0].in_features)
        self.grid = segments.grid
        room = shape.room(max(segments.grid.rows_per_block))
        blocks = (segments.blocks, lots)
        self._launch = KernelLaunch(
            segments.kernel, blocks, shape.threads, room, [problem], limits.overlap, segments.grid.cluster
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
            if count := clusters_at_once(int(kernel.handle), cluster, shape.threads, limits.shared_bytes):
                found[cluster] = count
    return found
