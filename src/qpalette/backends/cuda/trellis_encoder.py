"""The trellis search on a CUDA device: chooses how many tiles a block takes, gives it scratch memory, launches it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qpalette.backends.cuda.compiler import KernelLaunch, load_kernel
from qpalette.codes.description import Search

SOURCE = Path(__file__).with_name("trellis_encoder.cu").read_text(encoding="utf-8")
MOST_TILES = 16
MOST_LANES = 4
MOST_SIBLINGS = 4
MOST_THREADS = 1024
SCRATCH_SHARE = 0.5  # of the device's free memory, for the winners of every step, where all blocks' do not fit
BUSY_THREADS = 512  # a block should have: with few tiles a thread then takes fewer siblings (1024: 13 % slower)


@dataclass(frozen=True)
class Launch:
    """How a search fits a device: compile-time constants, and bytes per block."""

    macros: tuple[tuple[str, int], ...]
    tiles: int
    threads: int
    shared_bytes: int
    winner_bytes: int
    cost_bytes: int  # in global memory; 0 where both cost buffers fit in shared memory


def plan_launch(
    memory: int, values: int, steps: int, low: int, high: int, shared_limit: int, most_tiles: int = MOST_TILES
) -> Launch:
    """One block per multiprocessor, with as many tiles as fit in `shared_limit` bytes: a loaded value serves them all.

    Four siblings by four lanes per thread and the most threads that have work were the fastest of those tried on an
    H100 at 2, 3, 3.25 and 4 bits, one and two values per step. `most_tiles` leaves work for every multiprocessor when
    there are few tiles, as in a step of calibrated rounding.
    """
    groups = 1 << (memory - low)

    def needed(tiles: int) -> int:
        return 4 * tiles * (2 * groups + steps * values)

    values_bytes = 4 << (memory - 1)  # of the states whose oldest bit is 0: a float32, or two float16
    fitting = [1 << i for i in range(most_tiles.bit_length()) if needed(1 << i) <= shared_limit]
    tiles = fitting[-1] if fitting else 1
    lanes = min(tiles, MOST_LANES)
    siblings = MOST_SIBLINGS
    while siblings > 1 and groups // siblings * (tiles // lanes) < BUSY_THREADS:
        siblings //= 2
    items = groups // siblings * (tiles // lanes)
    threads = min(MOST_THREADS, max(128, 1 << (items.bit_length() - 1)))
    with_values = bool(fitting) and needed(tiles) + values_bytes <= shared_limit
    macros = {
        "MEMORY": memory,
        "VALUES": values,
        "STEPS": steps,
        "SHIFT_LOW": low,
        "SHIFT_HIGH": high,
        "TILES": tiles,
        "LANES": lanes,
        "MOST_SIBLINGS": siblings,
        "THREADS": threads,
        "COSTS_IN_SHARED": int(bool(fitting)),
        "VALUES_IN_SHARED": int(with_values),
    }
    return Launch(
        macros=tuple(sorted(macros.items())),
        tiles=tiles,
        threads=threads,
        shared_bytes=(needed(tiles) if fitting else 4 * tiles * steps * values) + with_values * values_bytes,
        winner_bytes=tiles * steps * groups * (2 if high > 8 else 1),
        cost_bytes=0 if fitting else 8 * groups * tiles,
    )


@lru_cache(maxsize=16)
def _limits(device: int) -> tuple[int, int]:
    """(multiprocessors, bytes of dynamic shared memory that a block may have besides the kernel's own)."""
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it
    return properties.multi_processor_count, shared - 2048


def encode_states(sources: torch.Tensor, search: Search) -> torch.Tensor:
    """States of the best tail-biting path found for each tile: int32 [tiles, steps].

    sources: float32 [tiles, 256] in scan order, on the device and contiguous.
    """
    state_values = search.values(sources.device)
    steps, values, memory = len(search.shifts), state_values.shape[1], search.memory
    device = sources.device.index or 0
    multiprocessors, shared_limit = _limits(device)
    share = -(-sources.shape[0] // multiprocessors)
    most_tiles = min(MOST_TILES, 1 << (share - 1).bit_length())
    low, high, shifts_there = _shifts_on(search.shifts, sources.device)
    how = plan_launch(memory, values, steps, low, high, shared_limit, most_tiles)
    batches = -(-sources.shape[0] // how.tiles)
    blocks = min(multiprocessors, batches)
    padded = sources.new_zeros(batches * how.tiles, sources.shape[1])
    padded[: sources.shape[0]] = sources
    states = torch.empty(batches * how.tiles, steps, dtype=torch.int32, device=sources.device)
    try:
        winners, spilled = _scratch(how, blocks, sources.device)
    except torch.OutOfMemoryError:  # fewer blocks then; asking how many first would cost as much as a small search
        free, _ = torch.cuda.mem_get_info(device)
        blocks = max(1, min(blocks, int(free * SCRATCH_SHARE) // (how.winner_bytes + how.cost_bytes)))
        winners, spilled = _scratch(how, blocks, sources.device)
    kernel = load_kernel(SOURCE, "encode", dict(how.macros), device, how.shared_bytes)
    sources_at, values_at, shifts_at = (ctypes.c_void_p(t.data_ptr()) for t in (padded, state_values, shifts_there))
    outputs = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (winners, spilled, states)]
    stream = torch.cuda.current_stream(device).cuda_stream
    arguments = [sources_at, values_at, ctypes.c_float(search.scale), shifts_at, ctypes.c_int32(len(padded)), *outputs]
    KernelLaunch(kernel, blocks, how.threads, how.shared_bytes, arguments).start(stream)
    return states[: sources.shape[0]]


def _scratch(how: Launch, blocks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(winners of every step, costs that do not fit in shared memory), as bytes."""
    sizes = blocks * how.winner_bytes, max(1, blocks * how.cost_bytes)
    winners, spilled = (torch.empty(size, dtype=torch.uint8, device=device) for size in sizes)
    return winners, spilled


@lru_cache(maxsize=64)
def _shifts_on(shifts: tuple[int, ...], device: torch.device) -> tuple[int, int, torch.Tensor]:
    """(least, most, all of them on the device)."""
    return min(shifts), max(shifts), torch.tensor(shifts, dtype=torch.uint8, device=device)
