"""Viterbi search over the bitshift trellis of a tail-biting code, sixteen tiles at a time, one tile per SIMD lane.

The recursion of DESIGN section 3 ("Encoder cost"): before step t only M_t[g] is kept, the least cost of a path whose
last L - k_t state bits are g. A step turns M_t into M_{t+1}:

    M_{t+1}[g'] = min over j in 2^k_{t+1} of  M_t[s >> k_t] + |x_t - value[s]|^2,   s = (j << (L - k_{t+1})) | g'

The candidate j rides in the lowest bits of the cost's own mantissa, so that one integer minimum keeps cost and winner
together and ties break towards the smaller j; the reference encoder does exactly the same, hence equal codes.

Shifts are compile-time constants: with them as run-time values the same step took 1.9 instead of 0.55 ns per
16 states at k = 2 (Zen 5), because short loops were not unrolled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import get_num_threads, prange

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import kernel, parallel_kernel

LANES = simd.LANES
UNREACHABLE = np.float32(1e30)


def _make_step(memory: int, shift_in: int, shift_out: int, pairs: bool) -> Any:
    """The recursion above for k_t = shift_in and k_{t+1} = shift_out; with `pairs` a step has two weights."""
    width = 2 if pairs else 1
    candidates = 1 << shift_out
    group_bits = memory - shift_out
    siblings = 1 << min(shift_in, group_bits)  # groups that share the same predecessors
    index_bits = np.int32(candidates - 1)

    @kernel
    def step(before, after, winners, offset, source, row, values, predecessors):  # type: ignore[no-untyped-def]
        x = simd.loadf(source, row * width * LANES)
        y = simd.loadf(source, (row * width + width - 1) * LANES)
        cost_mask = simd.splati(np.int32(~index_bits))
        index_mask = simd.splati(index_bits)
        for family in range((1 << group_bits) // siblings):
            first = family * siblings
            for j in range(candidates):  # gathered once: they lie 2^n apart, in the same few cache sets
                state_group = ((j << group_bits) | first) >> shift_in
                simd.store(predecessors, j * LANES, simd.loadf(before, state_group * LANES))
            for group in range(first, first + siblings):
                best = simd.splati(np.int32(0x7FFFFFFF))
                for j in range(candidates):
                    value = (group * candidates + j) * width
                    error = simd.subf(x, simd.load_splatf(values, value))
                    square = simd.mulf(error, error)
                    if pairs:
                        second = simd.subf(y, simd.load_splatf(values, value + 1))
                        square = simd.addf(square, simd.mulf(second, second))
                    cost = simd.addf(square, simd.loadf(predecessors, j * LANES))
                    tagged = simd.ori(simd.andi(simd.bits_of_float(cost), cost_mask), simd.splati(np.int32(j)))
                    best = simd.mini(best, tagged)
                simd.store(after, group * LANES, simd.float_of_bits(simd.andi(best, cost_mask)))
                simd.store_narrow(winners, offset + group * LANES, simd.andi(best, index_mask))

    return step


@lru_cache(maxsize=64)
def _make_search(memory: int, low: int, high: int, pairs: bool) -> Callable[..., None]:
    """Encoder of all tiles for rate patterns made of `low` and `high` bits per step."""
    step_ll, step_lh = _make_step(memory, low, low, pairs), _make_step(memory, low, high, pairs)
    step_hl, step_hh = _make_step(memory, high, low, pairs), _make_step(memory, high, high, pairs)
    winner_type = np.uint8 if high <= 8 else np.uint16
    most_groups = 1 << (memory - low)

    @kernel
    def forward(source, shifts, start, steps, values, costs, winners, predecessors):  # type: ignore[no-untyped-def]
        for i in range(steps):
            t = (start + i) % shifts.size
            to_high = shifts[(t + 1) % shifts.size] != low
            before, after = costs[i % 2], costs[(i + 1) % 2]
            offset = i * most_groups * LANES
            if shifts[t] == low:
                if to_high:
                    step_lh(before, after, winners, offset, source, t, values[1], predecessors)
                else:
                    step_ll(before, after, winners, offset, source, t, values[0], predecessors)
            elif to_high:
                step_hh(before, after, winners, offset, source, t, values[1], predecessors)
            else:
                step_hl(before, after, winners, offset, source, t, values[0], predecessors)

    @kernel
    def trace_back(shifts, start, steps, stop, group, lane, winners, states):  # type: ignore[no-untyped-def]
        """Walk from `group` after the last step back to before step `stop`; returns the group there."""
        for i in range(steps - 1, stop - 1, -1):
            t = (start + i) % shifts.size
            j = winners[(i * most_groups + group) * LANES + lane]
            state = (np.int64(j) << (memory - shifts[(t + 1) % shifts.size])) | group
            states[t, lane] = state
            group = state >> shifts[t]
        return group

    @kernel
    def search(source, shifts, values, costs, winners, predecessors, states):  # type: ignore[no-untyped-def]
        length = shifts.size
        half = length // 2
        costs[0][:] = np.float32(0)
        forward(source, shifts, half, length, values, costs, winners, predecessors)
        seam = np.empty(LANES, np.int64)
        final_groups = 1 << (memory - shifts[half])
        for lane in range(LANES):
            best = 0
            for group in range(final_groups):
                if costs[length % 2][group * LANES + lane] < costs[length % 2][best * LANES + lane]:
                    best = group
            seam[lane] = trace_back(shifts, half, length, half, best, lane, winners, states)
        costs[0][:] = UNREACHABLE
        for lane in range(LANES):
            costs[0][seam[lane] * LANES + lane] = np.float32(0)
        forward(source, shifts, 0, length, values, costs, winners, predecessors)
        for lane in range(LANES):
            trace_back(shifts, 0, length, 0, seam[lane], lane, winners, states)

    @parallel_kernel
    def search_all(sources, shifts, values, states):  # type: ignore[no-untyped-def]
        workers = get_num_threads()
        for worker in prange(workers):
            costs = np.empty((2, most_groups * LANES), np.float32)
            winners = np.empty(shifts.size * most_groups * LANES, winner_type)
            predecessors = np.empty((1 << high) * LANES, np.float32)
            for batch in range(worker, sources.shape[0], workers):
                search(sources[batch], shifts, values, costs, winners, predecessors, states[batch])

    return search_all


def encode_states(sources: np.ndarray, shifts: np.ndarray, values: np.ndarray, memory: int) -> np.ndarray:
    """States of the best tail-biting path found for each tile.

    sources: float32 [tiles, 256] in scan order; shifts: int64 [steps], at most two neighbouring values;
    values: float32 [2^memory, 1 or 2], the weights that each state stands for. Returns int32 [tiles, steps].
    """
    tiles, weights = sources.shape
    steps, width = len(shifts), values.shape[1]
    batches = -(-tiles // LANES)
    padded = np.zeros((batches * LANES, weights), np.float32)
    padded[:tiles] = sources
    lanes = np.ascontiguousarray(padded.reshape(batches, LANES, weights).transpose(0, 2, 1)).reshape(batches, -1)
    low, high = int(shifts.min()), int(shifts.max())
    by_candidate = [values.reshape(1 << k, -1, width).transpose(1, 0, 2) for k in (low, high)]  # [group, j]: as read
    ordered = np.stack([np.ascontiguousarray(part, np.float32).reshape(-1) for part in by_candidate])
    states = np.empty((batches, steps, LANES), np.int32)
    _make_search(memory, low, high, width == 2)(lanes, shifts, ordered, states)
    return states.transpose(0, 2, 1).reshape(batches * LANES, steps)[:tiles]
