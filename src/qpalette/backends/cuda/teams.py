"""Products of 33 tokens and more on a CUDA device of compute capability 9.0: decoded once for up to 128 of them, and
multiplied by four warps together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from qpalette.backends.cuda.compiler import KernelLaunch
from qpalette.backends.cuda.decoder import DecoderSpec
from qpalette.backends.cuda.multiply import fixed_point, sum_bytes
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

SOURCE = Path(__file__).with_name("teams.cu").read_text(encoding="utf-8")
INSTRUCTION = """
// sum (+)= a b of a tile of each warp of a team and all columns, begun.
__device__ __forceinline__ void multiply_tile_of_team(float (&sum)[{fragments}][4], const u32 (&a)[4],
                                                      unsigned long long b, int add) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p, {add}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {operands};}}"
        : {sums} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add) : "memory");
}}
"""
FROM = 33  # tokens; fewer are multiplied faster by multiply.cu, whose warps need no others
MOST_TOKENS = 512  # every lot decodes anew; of more, decoding once and cuBLAS was not found slower
CONTROL_BYTES = 128
CHUNKS_OF_AN_ADDITION = 2  # that are multiplied while a block's sum is added to others in memory
MOST_STAGES = 4
GROUP = THREADS // 32  # row tiles that a block has at once


@dataclass(frozen=True)
class Team:
    """What a kernel for so many columns of x' is compiled for: see teams.cu."""

    columns: int
    piece: int  # tiles
    at_once: int  # tiles

    @property
    def stage_bytes(self) -> int:
        """Of a piece of x'."""
        return 2 * TILE * self.piece * self.columns


TEAMS = {team.columns: team for team in (Team(48, 16, 2), Team(64, 16, 4), Team(96, 16, 2), Team(128, 8, 1))}
COLUMNS = tuple(TEAMS)  # that kernels are compiled for


def serves(tokens: int, limits: DeviceLimits) -> bool:
    """wgmma is of this compute capability alone."""
    return tokens >= FROM and limits.capability == (9, 0)


def columns_of(tokens: int) -> tuple[int, int]:
    """(lots, columns of each), as for fewer tokens."""
    lots = -(-tokens // COLUMNS[-1])
    return lots, min(columns for columns in COLUMNS if lots * columns >= tokens)


def stages_of(limits: DeviceLimits, columns: int) -> int:
    """Pieces of x' in shared memory."""
    room = limits.shared_bytes - limits.table_bytes - CONTROL_BYTES
    return min(MOST_STAGES, room // TEAMS[columns].stage_bytes)


def kernel_macros(limits: DeviceLimits, columns: int) -> dict[str, int]:
    """The compile-time constants of teams.cu, beside the decoders."""
    team = TEAMS[columns]
    return {
        "THREADS": THREADS,
        "TABLE_BYTES": limits.table_bytes,
        "BATCH": columns,
        "PIECE": team.piece,
        "STAGES": stages_of(limits, columns),
        "AT_ONCE": team.at_once,
        "WGMMA": 1,
    }


def source_of(columns: int) -> str:
    """The kernel; the instruction has as many operands as its number of columns wants."""
    count = columns // 2
    sums, a = (", ".join(f"%{i}" for i in numbers) for numbers in (range(count), range(count, count + 4)))
    instruction = INSTRUCTION.format(
        fragments=columns // 8,
        columns=columns,
        operands=f"{{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0",
        add=f"%{count + 5}",
        sums=", ".join(f'"+f"(sum[{i // 4}][{i % 4}])' for i in range(count)),
    )
    return instruction + SOURCE


def source_for(decoders: Sequence[DecoderSpec], columns: int) -> str:
    """One translation unit: every decoder of the kernel's set, then the kernel."""
    return with_segments(source_of(columns), decoders)


class TeamLaunch:
    """y = W' x' of at most MOST_SEGMENTS matrices in the chunk layout, for one number of tokens and one type of y, as
    ProductLaunch is for fewer. Sums of runs are added up in `zero_bytes` of memory, which are zero before."""

    def __init__(
        self, members: Sequence[PackedLinear], tokens: int, dtype: torch.dtype, first: int, width: int
    ) -> None:
        limits, (lots, columns) = device_limits(members[0].codes.device.index or 0), columns_of(tokens)
        offsets = list(accumulate((member.out_features for member in members), initial=first))
        rows, chunks = [all_rows(member) for member in members], members[0].codes.shape[1]
        groups = [-(-part.tiles // GROUP) for part in rows]
        multiprocessors = max(1, limits.multiprocessors // lots)
        run = run_of(sum(groups), chunks, multiprocessors)
        planner = Planner(-(-chunks // run), multiprocessors)
        macros = tuple(kernel_macros(limits, columns).items())
        segments = prepare_segments(
            rows, offsets, source_of(columns), "multiply_by_teams", macros, limits.table_bytes, planner
        )
        self._problem = problem = segments.problem
        problem.batch, problem.out_type, problem.y_stride = tokens, TYPES[dtype], width
        problem.fixed_point, problem.run = fixed_point(members[0].in_features), run
        problem.sum_tiles = sum(part.tiles for part in rows)
        self._count_bytes = -(-4 * lots * problem.sum_tiles // 16) * 16
        sums = lots * problem.sum_tiles * sum_bytes(columns)
        self.zero_bytes = self._count_bytes + sums if run < chunks else 0
        room = limits.table_bytes + CONTROL_BYTES + stages_of(limits, columns) * TEAMS[columns].stage_bytes
        self._launch = KernelLaunch(segments.kernel, (segments.blocks, lots), THREADS, room, [problem], limits.overlap)

    def start(self, x: int, x_scales: int, y: int, stream: int, zeros: int = 0) -> None:
        """Addresses of x' and its divisors, as `rotate` leaves them, of the results, and of zeros."""
        problem = self._problem
        problem.x, problem.x_scales, problem.y = x, x_scales, y
        problem.counts, problem.sums = zeros, zeros + self._count_bytes
        self._launch.start(stream)


class Planner:
    """Items are alike: a group of row tiles and a run of chunks, of which a block takes some in a row."""

    def __init__(self, runs: int, multiprocessors: int) -> None:
        self.runs, self.multiprocessors = runs, multiprocessors

    def __call__(self, kernel: Any, row_tiles: tuple[int, ...], costs: tuple[float, ...]) -> Grid:
        items = tuple(-(-tiles // GROUP) * self.runs for tiles in row_tiles)
        return plan_grid(items, costs, self.multiprocessors, max(items))


def run_of(groups: int, chunks: int, multiprocessors: int) -> int:
    """Chunks of a run: what keeps the busiest block busy for the shortest time. The same for any tokens of so many
    lots, and so their bits are."""

    def seconds(run: int) -> float:
        runs = -(-chunks // run)
        return -(-groups * runs // multiprocessors) * (run + (CHUNKS_OF_AN_ADDITION if runs > 1 else 0))

    return min(range(1, chunks + 1), key=lambda run: (seconds(run), -run))
