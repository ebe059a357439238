"""The kernels of a cache of codes: what they are compiled for, what they are told, how many blocks they get."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, e, log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpalette.backends.cuda.compiler import KernelLaunch, load_kernel
from qpalette.backends.cuda.decoder import COMMON_SOURCE
from qpalette.backends.cuda.rotate import TYPES
from qpalette.backends.cuda.segments import DeviceLimits, device_limits
from qpalette.kvcache import PAGE, CacheCode, parse_code
from qpalette.kvcache.vectors import planes


def _source(*names: str) -> str:
    files = (Path(__file__).with_name(name) for name in ("coded.cuh", *names))
    return COMMON_SOURCE + "".join(file.read_text(encoding="utf-8") for file in files)


WRITE_SOURCE, READ_SOURCE = _source("coded_write.cuh", "coded_write.cu"), _source("coded_read.cu")
WRITE_MANY_SOURCE = _source("coded_write.cuh", "coded_write_many.cu")
ATTEND_SOURCE = _source("coded_look_up.cuh", "coded_attend.cuh", "coded_attend.cu")
MOST_DIM = 256
MOST_ROWS = 64  # queries of a key head in one call
COLUMNS = 8  # queries of a block: the columns of a matrix instruction
TILE = 16  # tokens of a matrix instruction
SCHEDULERS = 4  # of a multiprocessor
MANY = 9  # tokens from which on a warp writes several of them
MANY_WARPS = 6  # of its block, at most: two blocks have registers enough
MANY_BYTES = 96 << 10  # of its shared memory: every device has it, large ones twice
PIECE = 4096  # tokens that are float32 at a time
WRITE_THREADS, READ_THREADS = 256, 256
NEAR_DIM = 128  # of a vector: what its errors are fed back by, 64 kB, fits in shared memory


@dataclass(frozen=True)
class Coded:
    """A stream's code for its kernels."""

    code: CacheCode
    dim: int
    unbiased: bool

    def macros(self, name: str) -> dict[str, int]:
        return {f"{name}_DIM": self.dim, f"{name}_WIDTH": self.code.width, f"{name}_BITS": self.code.index_bits}

    @property
    def pairs(self) -> bool:
        """Whether two indexes are looked up at once."""
        return self.code.width == 1 and self.code.index_bits <= 4

    @property
    def table_bytes(self) -> int:
        """In shared memory, with a copy for each bank, and room between for another table's."""
        return 256 << self.code.index_bits * (2 if self.pairs else 1)

    @property
    def padded(self) -> int:
        return -(-self.dim // 64) * 64


@lru_cache(maxsize=64)
def points_of(name: str, device: torch.device) -> Tensor:
    """float32: the points of a code. Those of one number rise, and are followed by borders: the least number to which
    the next point is nearer, as float32 rounds both differences."""
    with torch.inference_mode(False):
        points = parse_code(name).points(torch.device("cpu"))
        if points.shape[1] > 1:
            return points.flatten().to(device)
        low, high = points[:-1, 0], points[1:, 0]
        before, border = low, high
        while ((middle := (before + border) / 2) != before).logical_and(middle != border).any():
            is_high = high - middle < middle - low
            before, border = torch.where(is_high, before, middle), torch.where(is_high, middle, border)
        return torch.cat([points[:, 0], border, border.new_tensor([torch.inf])]).to(device)


@lru_cache(maxsize=64)
def lookups_of(name: str, device: torch.device) -> Tensor:
    """What each look-up of a code gives: float16 [entries, 2 or 4]; one number alone is followed by 0."""
    with torch.inference_mode(False):
        code = parse_code(name)
        points = code.points(torch.device("cpu"))
        if Coded(code, 64, False).pairs:
            pairs, index = torch.arange(1 << 2 * code.index_bits), torch.zeros(2, 1 << 2 * code.index_bits).long()
            shift = 0
            for width in planes(code.index_bits):  # each plane has the fields of both, the first one's lower
                for number in range(2):
                    field = pairs >> (2 * shift + number * width) & ((1 << width) - 1)
                    index[number] |= field << shift
                shift += width
            points = points[:, 0][index].mT
        elif code.width == 1:
            points = torch.nn.functional.pad(points, (0, 1))
        return points.half().contiguous().to(device)


class WriteStream(ctypes.Structure):
    """As in coded_write.cuh."""

    _fields_ = (
        ("vectors", ctypes.c_void_p),
        *((f"vector_{name}", ctypes.c_longlong) for name in ("batch", "head", "token")),
        *((name, ctypes.c_void_p) for name in ("matrix", "mean", "feedback", "gain", "points")),
        *((name, ctypes.c_void_p) for name in ("pages", "sinks", "ring", "ring_tokens")),
        *((name, ctypes.c_int) for name in ("page_count", "is_shared")),
    )


class WriteProblem(ctypes.Structure):
    """As in coded_write.cuh."""

    _fields_ = (
        ("streams", WriteStream * 2),
        *((name, ctypes.c_void_p) for name in ("tokens", "starts")),
        *((name, ctypes.c_int) for name in ("batch", "heads", "count", "length", "sink_count", "window")),
    )


class ReadProblem(ctypes.Structure):
    """As in coded_read.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pages", "points", "out")),
        *((name, ctypes.c_int) for name in ("page_count", "first", "count")),
    )


class AttendStream(ctypes.Structure):
    """As in coded_attend.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pages", "sinks", "ring", "ring_tokens", "table", "matrix", "mean")),
        *((name, ctypes.c_int) for name in ("page_count", "is_shared")),
    )


class AttendProblem(ctypes.Structure):
    """As in coded_attend.cuh."""

    _fields_ = (
        *(("keys", AttendStream), ("values", AttendStream)),
        *((name, ctypes.c_void_p) for name in ("query", "mask", "count", "starts", "out", "parts", "arrived")),
        *((name, ctypes.c_longlong) for name in ("query_batch", "query_head", "query_row", "mask_batch")),
        *((name, ctypes.c_int) for name in ("heads", "rows", "length", "sink_count", "window")),
        ("scale", ctypes.c_float),
    )


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WritePlan:
    """How new tokens are written. One launch for one stream or for two."""

    source: str
    name: str
    macros: dict[str, int]
    grid: tuple[int, int]
    shared_bytes: int


def plan_write(streams: Sequence[Coded], shape: tuple[int, int, int], dtype: torch.dtype) -> WritePlan:
    """shape: batch, key heads, tokens."""
    batch, heads, count = shape
    keys, values = streams[0], streams[-1]
    unbiased = {"KEY_UNBIASED": int(keys.unbiased), "VALUE_UNBIASED": int(values.unbiased)}
    macros = keys.macros("KEY") | values.macros("VALUE") | unbiased | {"TYPE": TYPES[dtype]}
    if count >= MANY:
        warps = next(warps for warps in range(MANY_WARPS, 0, -1) if _bytes_of_many(streams, warps) <= MANY_BYTES)
        grid = (-(-count // (TILE * warps)) * batch * heads, len(streams))
        own = {"THREADS": 32 * warps}
        return WritePlan(WRITE_MANY_SOURCE, "cache_write_many", macros | own, grid, _bytes_of_many(streams, warps))
    near = max((each.dim**2 for each in streams if each.dim <= NEAR_DIM), default=0)
    floats = 2 * max(each.dim for each in streams) + WRITE_THREADS + near
    own = {"THREADS": WRITE_THREADS, "NEAR_DIM": NEAR_DIM}
    return WritePlan(WRITE_SOURCE, "cache_write", macros | own, (batch * heads * count, len(streams)), 4 * floats)


def _bytes_of_many(streams: Sequence[Coded], warps: int) -> int:
    """Of a block's shared memory, as coded_write_many.cu has it: points and borders, vectors, two slabs of 4 rows of
    4 x 32 bits, and 32 of these that are read behind them."""
    points = (max(2, each.code.width) << each.code.index_bits for each in streams)
    rest = (TILE * warps * (each.dim + 8) + 32 * (each.dim + 2) + 128 for each in streams)
    return 4 * max(map(sum, zip(points, rest, strict=True)))


def start_write(plan: WritePlan, streams: Sequence[WriteStream], problem: WriteProblem, device: int) -> None:
    for at, stream in enumerate(streams):
        problem.streams[at] = stream
    threads = plan.macros["THREADS"]
    _start(plan.source, plan.name, plan.macros, device, plan.grid, threads, plan.shared_bytes, problem)


# --- reading ---------------------------------------------------------------------------------------------------------


def start_read(stream: Coded, problem: ReadProblem, vectors: int, device: int) -> None:
    blocks = -(-problem.count * (stream.dim // stream.code.width) // READ_THREADS)
    _start(READ_SOURCE, "cache_read", stream.macros("KEY"), device, (blocks, vectors), READ_THREADS, 0, problem)


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttendPlan:
    """How attention of some queries is launched."""

    macros: dict[str, int]
    grid: tuple[int, int, int]
    shared_bytes: int

    @property
    def part_numbers(self) -> int:
        """float32 that lie between blocks."""
        splits, heads, batch = self.grid
        return batch * heads * splits * self.of_part

    @property
    def of_part(self) -> int:
        return 16 + COLUMNS * self.macros["VALUE_DIM"]


def warps_of(keys: Coded, values: Coded) -> int:
    """Of a block: as many as the registers are enough for."""
    return 8 if max(keys.padded, values.padded) > 128 else 12


def step_of(keys: Coded, values: Coded, rows: int) -> int:
    """Tokens that a warp attends to at a time: again as many as the registers are enough for."""
    is_short = max(each.code.index_bits / each.code.width for each in (keys, values)) <= 4
    return 32 if rows <= COLUMNS // 2 and is_short else 16


def plan_attend(keys: Coded, values: Coded, shape: tuple[int, int, int], length: int, dtype: torch.dtype,
                limits: DeviceLimits) -> AttendPlan:  # fmt: skip
    """shape: batch, key heads, queries of each. A block a multiprocessor, as long as each scheduler has a step."""
    batch, heads, rows = shape
    row_blocks = -(-rows // COLUMNS)
    macros = {
        **keys.macros("KEY"),
        **values.macros("VALUE"),
        "SAME": int(keys.code == values.code),
        "ROWS": -(-rows // row_blocks),
        "TYPE": TYPES[dtype],
        "WARPS": warps_of(keys, values),
    }
    warps, own_rows = macros["WARPS"], macros["ROWS"]
    macros["STEP"] = step = step_of(keys, values, own_rows)
    splits = max(1, min(limits.multiprocessors // (batch * heads * row_blocks), ceil(length / (step * SCHEDULERS))))
    tables = max(keys.table_bytes, values.table_bytes)
    parts = warps * 4 * (16 + own_rows * (values.padded + 8))
    sums = own_rows * 4 * max(32 * warps, keys.dim, values.dim)
    return AttendPlan(macros, (splits, heads * row_blocks, batch), max(tables + sums, parts, 64 * splits))


def start_attend(plan: AttendPlan, problem: AttendProblem, device: int) -> None:
    threads = 32 * plan.macros["WARPS"]
    name = "cache_attend"
    _start(ATTEND_SOURCE, name, plan.macros, device, plan.grid, threads, plan.shared_bytes, problem)


def log2_scale(scale: float) -> float:
    return scale * log2(e)


def _start(
    source: str,
    name: str,
    macros: dict[str, int],
    device: int,
    grid: tuple[int, ...],
    threads: int,
    shared_bytes: int,
    problem: Any,
) -> None:
    with torch.cuda.device(device):
        kernel = load_kernel(source, name, macros, device, shared_bytes)
        stream = torch.cuda.current_stream(device).cuda_stream
        KernelLaunch(kernel, grid, threads, shared_bytes, [problem], device_limits(device).overlap).start(stream)


def limits_of(device: torch.device) -> DeviceLimits:
    return device_limits(device.index or 0)


def page_count(length: int) -> int:
    return -(-length // PAGE)
