"""Products of many tokens with packed matrices on a CUDA device: decoded once for up to 32 of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from qpalette.backends.cuda.compiler import KernelLaunch, clusters_at_once
from qpalette.backends.cuda.decoder import DecoderSpec
from qpalette.backends.cuda.layout import CHUNK
from qpalette.backends.cuda.multiply import (
    MOST_BATCH,
    TILES_SOURCE,
    batch_columns,
    cuts_of,
    fixed_point,
    kernel_macros,
    most_rows,
    sum_bytes,
)
from qpalette.backends.cuda.rotate import TYPES
from qpalette.backends.cuda.segments import (
    THREADS,
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

SOURCE = TILES_SOURCE + Path(__file__).with_name("tiles.cu").read_text(encoding="utf-8")
COLUMNS = (24, 32)  # that kernels are compiled for
CLUSTERS = (1, 2, 4, 8)  # blocks that share rows; 8 is the most that every device with clusters has
# Estimates, not measured, in cycles of a multiprocessor: what a row tile and a chunk take, for each unit of decode_cost
# and for each column; bytes of x' from the second-level cache; what a block takes beside, and one of a cluster.
DECODE_CYCLES = 16
COLUMN_CYCLES = 1.5
BYTES_PER_CYCLE = 24
BLOCK_CYCLES = 2000
CLUSTER_CYCLES = 1000


def block_cycles(columns: int, chunks: int, row_tiles: int, cost: float) -> float:
    """Of a block of so many chunks and row tiles, whose teams take a share each, and x' of a chunk once more each."""
    teams = THREADS // 32 // cuts_of(columns)
    items = -(-row_tiles * chunks // teams) * teams
    reading = (chunks + teams - 1) * chunk_bytes(columns) / BYTES_PER_CYCLE
    return max(items * (DECODE_CYCLES * cost + COLUMN_CYCLES * columns), reading)


def chunk_bytes(columns: int) -> int:
    """Of x'."""
    return 2 * TILE * CHUNK * columns


def columns_of(tokens: int) -> tuple[int, int]:
    """(lots, columns of each): the fewest lots of tokens, alike, and the least of the numbers of columns that kernels
    are compiled for."""
    if tokens <= MOST_BATCH:
        return 1, batch_columns(tokens)
    lots = -(-tokens // COLUMNS[-1])
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
    columns: int,
    most_rows: int,
) -> Grid:
    """The cut that takes the least time, by the rates above. `at_once`: (blocks of a cluster, how many clusters a lot
    of tokens has at once). The more blocks share rows, the less each reads of x', and the more sums are exchanged."""
    grids = [
        (replace(plan_grid(row_tiles, costs, clusters, most_rows), cluster=cluster), clusters)
        for cluster, clusters in at_once
    ]

    def cycles(grid: Grid, clusters: int) -> float:
        busy = max(map(partial(block_cycles, columns, -(-chunks // grid.cluster)), grid.rows_per_block, costs))
        waves = -(-sum(grid.blocks) // clusters)
        return waves * (busy + BLOCK_CYCLES + CLUSTER_CYCLES * (grid.cluster > 1))

    return min(grids, key=lambda found: cycles(*found))[0]


class TileLaunch:
    """y = W' x' of at most MOST_SEGMENTS matrices in the chunk layout, for one number of tokens and one type of y, as
    ProductLaunch is for fewer."""

    def __init__(
        self, members: Sequence[PackedLinear], tokens: int, dtype: torch.dtype, first: int, width: int
    ) -> None:
        limits = device_limits(members[0].codes.device.index or 0)
        lots, columns = columns_of(tokens)
        chunks, macros = members[0].codes.shape[1], kernel_macros(limits, columns)

        def planner(kernel: Any, row_tiles: tuple[int, ...], costs: tuple[float, ...]) -> Grid:
            there = clusters_there(kernel, limits)
            at_once = tuple((cluster, max(1, count // lots)) for cluster, count in there.items())
            return plan_clusters(row_tiles, costs, chunks, at_once, columns, most_rows(limits, columns))

        offsets = list(accumulate((member.out_features for member in members), initial=first))
        rows = [all_rows(member) for member in members]
        segments = prepare_segments(
            rows, offsets, SOURCE, "multiply_tiles", tuple(macros.items()), limits.table_bytes, planner
        )
        self._problem = problem = segments.problem
        problem.batch, problem.out_type, problem.y_stride = tokens, TYPES[dtype], width
        problem.fixed_point = fixed_point(members[0].in_features)
        self.grid = segments.grid
        room = limits.table_bytes + max(segments.grid.rows_per_block) * sum_bytes(columns)
        blocks = (segments.blocks, lots)
        self._launch = KernelLaunch(
            segments.kernel, blocks, THREADS, room, [problem], limits.overlap, segments.grid.cluster
        )

    def start(self, x: int, x_scales: int, y: int, stream: int) -> None:
        """Addresses of x' and its divisors, as `rotate` leaves them, and of the results."""
        problem = self._problem
        problem.x, problem.x_scales, problem.y = x, x_scales, y
        self._launch.start(stream)


def clusters_there(kernel: Any, limits: DeviceLimits) -> Mapping[int, int]:
    """How many clusters of a number of blocks are there at once."""
    found = {1: limits.multiprocessors}
    if limits.capability >= (9, 0):
        for cluster in CLUSTERS[1:]:
            if count := clusters_at_once(int(kernel.handle), cluster, THREADS, limits.shared_bytes):
                found[cluster] = count
    return found
