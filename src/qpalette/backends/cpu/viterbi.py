"""Viterbi search over the bitshift trellis of a tail-biting code, sixteen tiles at a time, one tile per SIMD lane.

The recursion of DESIGN section 3 ("Encoder cost"): before step t only M_t[g] is kept, the least cost of a path whose
last L - k_t state bits are g. A step turns M_t into M_{t+1}:

    M_{t+1}[g'] = min over j in 2^k_{t+1} of  M_t[s >> k_t] + |x_t - value[s]|^2,   s = (j << (L - k_{t+1})) | g'

The candidate j rides in the lowest bits of the cost's own mantissa, so that one integer minimum keeps cost and winner
together and ties break towards the smaller j; the reference encoder does exactly the same, hence equal codes.

The number of candidates is a compile-time constant, up to a chunk of 16: with short loops that were not unrolled a step
took 1.9 instead of 0.55 ns per 16 states at k = 2 (Zen 5). All else is known at run time alone, so that one kernel
serves every rate and memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import get_num_threads, prange

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import entry, kernel

LANES = simd.LANES
UNREACHABLE = np.float32(1e30)


def _make_step(chunk: int, width: int) -> Any:
    """The recursion above for steps of `width` weights, `chunk` candidates at a time."""

    @kernel
    def step(before, after, winners, offset, shift_in, shift_out, group_bits, source, row, values, predecessors):  # type: ignore[no-untyped-def]
        x = simd.loadf(source, row * width * LANES)
        y = simd.loadf(source, (row * width + width - 1) * LANES)
        candidates = 1 << shift_out
        siblings = 1 << min(shift_in, group_bits)  # groups that share the same predecessors
        cost_mask = simd.splati(np.int32(-candidates))
        index_mask = simd.splati(np.int32(candidates - 1))
        for first in range(0, 1 << group_bits, siblings):
            for j in range(candidates):  # gathered once: they lie 2^n apart, in the same few cache sets
                state_group = ((j << group_bits) | first) >> shift_in
                simd.store(predecessors, j * LANES, simd.loadf(before, state_group * LANES))
            for group in range(first, first + siblings):
                best = simd.splati(np.int32(0x7FFFFFFF))
                for start in range(0, candidates, chunk):
                    least = simd.splati(np.int32(0x7FFFFFFF))
                    for i in range(chunk):
                        value = (group * candidates + start + i) * width
                        error = simd.subf(x, simd.load_splatf(values, value))
                        square = simd.mulf(error, error)
                        if width == 2:
                            second = simd.subf(y, simd.load_splatf(values, value + 1))
                            square = simd.addf(square, simd.mulf(second, second))
                        cost = simd.addf(square, simd.loadf(predecessors, (start + i) * LANES))
                        tagged = simd.ori(simd.andi(simd.bits_of_float(cost), cost_mask), simd.splati(np.int32(i)))
                        least = simd.mini(least, tagged)
                    best = simd.mini(best, simd.ori(least, simd.splati(np.int32(start))))
                simd.store(after, group * LANES, simd.float_of_bits(simd.andi(best, cost_mask)))
                simd.store_narrow(winners, offset + group * LANES, simd.andi(best, index_mask))

    return step


@lru_cache(maxsize=2)
def _make_search(width: int) -> Any:
    """Encoder of all tiles for trellises of `width` weights a step."""
    step_2, step_4, step_8 = _make_step(2, width), _make_step(4, width), _make_step(8, width)
    step_16 = _make_step(16, width)

    @kernel
    def forward(source, shifts, start, steps, memory, values, costs, winners, predecessors):  # type: ignore[no-untyped-def]
        low = shifts.min()
        for i in range(steps):
            t = (start + i) % shifts.size
            into, out = shifts[t], shifts[(t + 1) % shifts.size]
            ordered = values[out - low]
            before, after = costs[i % 2], costs[(i + 1) % 2]
            bits = memory - out
            at = (i << (memory - low)) * LANES
            if out == 1:
                step_2(before, after, winners, at, into, out, bits, source, t, ordered, predecessors)
            elif out == 2:
                step_4(before, after, winners, at, into, out, bits, source, t, ordered, predecessors)
            elif out == 3:
                step_8(before, after, winners, at, into, out, bits, source, t, ordered, predecessors)
            else:
                step_16(before, after, winners, at, into, out, bits, source, t, ordered, predecessors)

    @kernel
    def trace_back(shifts, start, steps, stop, group, lane, memory, winners, states):  # type: ignore[no-untyped-def]
        """Walk from `group` after the last step back to before step `stop`; returns the group there."""
        most_groups = 1 << (memory - shifts.min())
        for i in range(steps - 1, stop - 1, -1):
            t = (start + i) % shifts.size
            j = winners[(i * most_groups + group) * LANES + lane]
            state = (np.int64(j) << (memory - shifts[(t + 1) % shifts.size])) | group
            states[t, lane] = state
            group = state >> shifts[t]
        return group

    @kernel
    def search(source, shifts, memory, values, costs, winners, predecessors, states):  # type: ignore[no-untyped-def]
        length = shifts.size
        half = length // 2
        costs[0][:] = np.float32(0)
        forward(source, shifts, half, length, memory, values, costs, winners, predecessors)
        seam = np.empty(LANES, np.int64)
        final_groups = 1 << (memory - shifts[half])
        for lane in range(LANES):
            best = 0
            for group in range(final_groups):
                if costs[length % 2][group * LANES + lane] < costs[length % 2][best * LANES + lane]:
                    best = group
            seam[lane] = trace_back(shifts, half, length, half, best, lane, memory, winners, states)
        costs[0][:] = UNREACHABLE
        for lane in range(LANES):
            costs[0][seam[lane] * LANES + lane] = np.float32(0)
        forward(source, shifts, 0, length, memory, values, costs, winners, predecessors)
        for lane in range(LANES):
            trace_back(shifts, 0, length, 0, seam[lane], lane, memory, winners, states)

    @entry(f"search {width}", parallel=True)
    def search_all(sources, shifts, memory, values, winner, workers, states):  # type: ignore[no-untyped-def]
        """`winner`: an array of the type that holds a candidate's number; `workers` take turns."""
        most_groups = 1 << (memory - shifts.min())
        for worker in prange(workers):
            costs = np.empty((2, most_groups * LANES), np.float32)
            winners = np.empty(shifts.size * most_groups * LANES, winner.dtype)
            predecessors = np.empty((1 << shifts.max()) * LANES, np.float32)
            for batch in range(worker, sources.shape[0], workers):
                search(sources[batch], shifts, memory, values, costs, winners, predecessors, states[batch])

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
    winner = np.empty(0, np.uint8 if high <= 8 else np.uint16)
    _make_search(width)(lanes, shifts, memory, ordered, winner, get_num_threads(), states)
    return states.transpose(0, 2, 1).reshape(batches * LANES, steps)[:tiles]
