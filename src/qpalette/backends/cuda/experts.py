"""The experts of a layer on a CUDA device, prepared: a few launches, and the host never waits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qpalette.backends.cuda.compiler import KernelLaunch, load_kernel
from qpalette.backends.cuda.decoder import COMMON_SOURCE, DecoderSpec, decoder_spec, entries
from qpalette.backends.cuda.layout import check_layout
from qpalette.backends.cuda.multiply import TILES_SOURCE, fixed_point, kernel_macros, most_rows, sum_bytes
from qpalette.backends.cuda.rotate import (
    ALIGNMENT,
    CHUNK_COLUMNS,
    MOST_OF_A_FEW_TOKENS,
    TYPES,
    RotationLaunch,
    aligned,
    padded_columns,
)
from qpalette.backends.cuda.scratch import ONE_AT_A_TIME, scratch
from qpalette.backends.cuda.segments import THREADS, decode_cost, device_limits, kernel_of
from qpalette.runtime import Gate, PackedExperts, PackedLinear, in_one_basis

_HERE = Path(__file__)
SHARED_SOURCE = _HERE.with_name("experts.cuh").read_text(encoding="utf-8")
SOURCE = TILES_SOURCE + SHARED_SOURCE + _HERE.with_name("experts.cu").read_text(encoding="utf-8")
ROUTES_SOURCE = COMMON_SOURCE + SHARED_SOURCE + _HERE.with_name("routes.cu").read_text(encoding="utf-8")
RUN = 8  # slots, as in experts.cuh: columns of a matrix instruction
LEAST_PLAN_THREADS, MOST_EXPERTS = 256, 1024  # threads of the block that plans, one for each expert
COMBINE_THREADS = 256
FEW = 64  # slots, as in experts.cu: of so many every block of a product makes the plan itself
ROOM_BYTES = 1 << 27  # of what lies between the kernels of a pass
MOST_COST = (1 << 31) - 1  # of a pass: kernels count in 32 bits
COSTS_OF_A_TILE = 4  # a tile's cost in quarters: whole numbers
# Of a bit of each weight, in the unit of decode_cost: what a tile costs at least (benchmarks/results/gemv.json, gate
# and up of 8 tokens: tcq2-2 22.1 us, tcq2-3.25 22.9, tcq2-4 26.9).
READ_COST = 3.6

# As in experts.cu and experts.cuh.
MATRIX = np.dtype(
    [
        *((name, np.uint64) for name in ("codes", "entries", "scales")),
        *((name, np.int32) for name in ("row_tiles", "rows", "out_offset", "decoder")),
        *((name, np.int32) for name in ("cost", "before", "chunk_bytes")),
        ("hash_unit", np.uint32),
    ],
    align=True,
)
RUN_BYTES, PLAN_BYTES = 20, 12
STATE_ROWS = 9  # row tiles in the place of whose sums is a block's state


class Projection(ctypes.Structure):
    """As in experts.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrices", "experts", "slots", "runs", "plan", "order")),
        *((name, ctypes.c_void_p) for name in ("x", "x_scales", "y", "entries")),
        *((name, ctypes.c_int) for name in ("expert_count", "slot_count", "slots_of_row", "parts", "chunks")),
        *((name, ctypes.c_int) for name in ("y_stride", "half_chunk", "index", "decoder", "most_rows")),
        ("fixed_point", ctypes.c_float),
    )


def takes(experts: PackedExperts) -> bool:
    """Whether one rotation serves all that experts multiply by first, all last matrices have one kind of it, and the
    kernels can read what there is."""
    first, last = [matrix for matrices in experts.first for matrix in matrices], experts.last
    kinds = {(matrix.rotation, matrix.diagonal.dtype, matrix.diagonal.data_ptr() % ALIGNMENT) for matrix in last}
    biases = [bias for bias in (experts.first_bias, experts.last_bias) if bias is not None]
    return (
        len(last) <= MOST_EXPERTS
        and all(bias.is_contiguous() and bias.dtype in TYPES for bias in biases)
        and len(kinds) == 1
        and all(each.diagonal.data_ptr() % ALIGNMENT == 0 for each in (first[0], *last))
        and all(decoder_spec(each.spec) is not None for each in (*first, *last))
        and in_one_basis(first)
    )


class CudaExperts:
    """x [N, K], index [N, k], weights [N, k] -> [N, K], an `ExpertsProduct`, for what `takes` allows.

    Products are as `CudaProduct`'s, what is between them float32. What is written into the matrices' tensors is seen by
    the next call; which of them share a diagonal is not asked again. Raises UnsupportedError for another layout.
    """

    def __init__(self, experts: PackedExperts) -> None:
        check_layout(experts.members)
        self._gate, self._biases = experts.gate, (experts.first_bias, experts.last_bias)
        self._count, self._device = len(experts.last), experts.last[0].codes.device
        order = _order(experts)
        self._first = _Products([experts.first[expert] for expert in order], 0)
        self._last = _Products([[experts.last[expert]] for expert in order], 1)
        self._diagonals = [matrix.diagonal for matrix in experts.last]
        costs = sorted(zip(order, self._first.costs, self._last.costs, strict=True))
        places = sorted(range(self._count), key=order.__getitem__)
        table = [(place, first, last) for place, (_, first, last) in zip(places, costs, strict=True)]
        self._table = torch.tensor(table, dtype=torch.int32).to(self._device)
        self.most_slots = _most_slots(self._first, self._last)
        self._gated = self._gate if isinstance(self._gate, Gate) else None
        self._launches: dict[torch.dtype, _Launches] = {}

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Of x's dtype, contiguous."""
        if x.dtype not in TYPES:
            return self(x.float(), index, weights).to(x.dtype)
        weights = weights if weights.dtype in TYPES else weights.float()
        x, index, weights = aligned(x.contiguous()), index.long().contiguous(), weights.contiguous()
        y, ranks = torch.empty_like(x), index.shape[1]
        if index.numel() == 0:
            return y.zero_()
        step = max(1, self.most_slots // ranks)
        with torch.cuda.device(self._device), ONE_AT_A_TIME:
            stream = torch.cuda.current_stream(self._device).cuda_stream
            for start in range(0, len(x), step):
                part = slice(start, start + step)
                self._run(x[part], index[part], weights[part], y[part], stream)
        return y

    def _run(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, y: torch.Tensor, stream: int) -> None:
        launches = self._launches.get(x.dtype)
        if launches is None:
            launches = self._launches[x.dtype] = _Launches(self, x.dtype)
        slots, ranks = index.numel(), index.shape[1]
        room = _Room(len(x), slots, self._count, self._first, self._last, self._device, stream)
        addresses = room.addresses
        launches.rotate_x.start(len(x), aligned(x).data_ptr(), addresses["x"], addresses["x_scales"], stream)
        routes = _Routes(index.data_ptr(), slots, ranks, self._count, self._table.data_ptr(), slots > FEW)
        if routes.planned:
            planned = [addresses[name] for name in ("ranks", "order", "runs", "plan")]
            launches.plan.start((1, 1), [routes.given, slots, self._count, routes.table, *planned], stream)
        self._first.start(room, routes, "x", "first", stream)
        inner = addresses["first"] if self._gated else self._inner(room, x.dtype, index)
        launches.rotate_inner.start(
            slots, inner, addresses["inner"], addresses["inner_scales"], stream, owners=routes.given
        )
        self._last.start(room, routes, "inner", "last", stream)
        bias = self._biases[1]
        launches.combine.start(
            (len(x), -(-self._last.width // COMBINE_THREADS)),
            [addresses["last"], routes.given, weights.data_ptr(), TYPES[weights.dtype]]
            + ([0, 0] if bias is None else [bias.data_ptr(), TYPES[bias.dtype]])
            + [ranks, self._count, self._last.width, y.data_ptr(), TYPES[y.dtype]],
            stream,
        )

    def _inner(self, room: _Room, dtype: torch.dtype, index: torch.Tensor) -> int:
        """The address of what the last matrices read, float32 [slots, I], by torch: where the gate is a class's own."""
        first = room.view("first", (index.numel(), self._first.width))
        if self._biases[0] is not None:
            first = first + self._biases[0][index.reshape(-1).clamp(0, self._count - 1)]
        room.kept = self._gate(first.to(dtype)).float().contiguous()
        return room.kept.data_ptr()


class _Routes(NamedTuple):
    """What the router gave for each slot, the table of experts, and whether a launch of its own plans the runs."""

    given: int
    slots: int
    ranks: int
    experts: int
    table: int
    planned: bool


class _Products:
    """What all experts multiply by, first or last: matrices [places][parts] of one number of inputs."""

    def __init__(self, members: Sequence[Sequence[PackedLinear]], index: int) -> None:
        flat = [matrix for parts in members for matrix in parts]
        device = flat[0].codes.device
        limits = device_limits(device.index or 0)
        self.inputs, self.width = flat[0].in_features, sum(matrix.out_features for matrix in members[0])
        self.rotation, self.diagonal = flat[0].rotation, flat[0].diagonal
        specs = [_decoder(matrix.spec) for matrix in flat]
        decoders = tuple(dict.fromkeys(specs))
        macros = tuple(kernel_macros(limits, RUN).items())
        kernel, places = kernel_of(SOURCE, "multiply_experts", macros, decoders, device.index or 0)
        place_of = dict(zip(decoders, places, strict=True))
        table, offsets = np.zeros(len(flat), MATRIX), _offsets(members)
        for row, matrix, spec, offset in zip(table, flat, specs, offsets, strict=True):
            row["codes"], row["scales"] = matrix.codes.data_ptr(), matrix.scales.data_ptr()
            row["entries"] = _table_of(matrix.spec, device).data_ptr()
            row["row_tiles"], row["rows"], row["out_offset"] = len(matrix.codes), matrix.out_features, offset
            row["decoder"], row["cost"] = place_of[spec], tile_cost(spec)
            row["chunk_bytes"], row["hash_unit"] = 4 * spec.chunk_words, spec.hash_unit(limits.table_bytes)
        tables, first_places, uses = np.unique(table["entries"], return_index=True, return_counts=True)
        common = int(uses.argmax())
        costs = (table["row_tiles"].astype(np.int64) * table["cost"]).reshape(len(members), -1)
        table["before"] = (costs.cumsum(1) - costs).reshape(-1)
        self.costs = costs.sum(1).tolist()
        self._table = torch.from_numpy(table.view(np.uint8)).to(device)
        # What the addresses are of, also where a tensor's data is exchanged.
        self._kept = [tensor.detach() for matrix in flat for tensor in (matrix.codes, matrix.scales, matrix.diagonal)]
        rows, chunks = most_rows(limits, RUN) - STATE_ROWS, flat[0].codes.shape[1]
        self._problem = Projection(
            matrices=self._table.data_ptr(),
            parts=len(members[0]),
            chunks=chunks,
            y_stride=self.width,
            half_chunk=chunks - 1 if self.inputs <= (chunks - 1) * CHUNK_COLUMNS + CHUNK_COLUMNS // 2 else -1,
            index=index,
            entries=int(tables[common]),
            decoder=int(table["decoder"][first_places[common]]),
            most_rows=min(rows, max(len(matrix.codes) for matrix in flat)),
            fixed_point=fixed_point(self.inputs),
        )
        room = limits.table_bytes + (STATE_ROWS + self._problem.most_rows) * sum_bytes(RUN)
        self._launch = KernelLaunch(kernel, limits.multiprocessors, THREADS, room, [self._problem], limits.overlap)

    def start(self, room: _Room, routes: _Routes, x: str, y: str, stream: int) -> None:
        problem, addresses = self._problem, room.addresses
        problem.slots, problem.slot_count = routes.given, routes.slots
        problem.experts, problem.expert_count = routes.table, routes.experts
        problem.slots_of_row = routes.ranks if problem.index == 0 else 1
        problem.plan = addresses["plan"] if routes.planned else None
        problem.runs, problem.order = addresses["runs"], addresses["order"]
        problem.x, problem.x_scales, problem.y = addresses[x], addresses[f"{x}_scales"], addresses[y]
        self._launch.start(stream)


class _Launches:
    """The kernels around the products, for tokens of one type."""

    def __init__(self, experts: CudaExperts, dtype: torch.dtype) -> None:
        first, last, gate = experts._first, experts._last, experts._gated
        index = experts._device.index or 0
        overlap = device_limits(index).overlap
        self.plan = _Launch("plan_runs", plan_threads(experts._count), "pnnp" + "pppp", index, overlap)
        self.combine = _Launch("combine", COMBINE_THREADS, "pppn" + "pn" + "nnnpn", index, overlap)
        # One way to cut a rotation for any number of tokens: a token's norm is summed up in one order.
        alike: dict[str, Any] = {"tokens": MOST_OF_A_FEW_TOKENS, "batch": 1, "overlap": overlap}
        self.rotate_x = RotationLaunch(first.rotation, first.diagonal, first.inputs, dtype=dtype, leads=True, **alike)
        table = torch.tensor([each.data_ptr() for each in experts._diagonals]).to(experts._device)
        alike |= {"table": table, "gate": gate, "bias": experts._biases[0]}
        self.rotate_inner = RotationLaunch(last.rotation, last.diagonal, last.inputs, dtype=torch.float32, **alike)


class _Launch:
    """A kernel of routes.cu; `types` of its arguments: p an address, n an int."""

    def __init__(self, name: str, threads: int, types: str, device: int, overlap: bool) -> None:
        kinds: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_int}
        self._arguments = [kinds[each]() for each in types]
        kernel = load_kernel(ROUTES_SOURCE, name, {"THREADS": threads}, device)
        self._launch = KernelLaunch(kernel, 1, threads, 0, self._arguments, overlap)

    def start(self, grid: tuple[int, int], values: Sequence[Any], stream: int) -> None:
        for argument, value in zip(self._arguments, values, strict=True):
            argument.value = value
        self._launch.grid = (*grid, 1)
        self._launch.start(stream)


def tile_cost(spec: DecoderSpec) -> int:
    return round(COSTS_OF_A_TILE * max(decode_cost(spec), READ_COST * spec.eighths / 8))


def _order(experts: PackedExperts) -> list[int]:
    """Experts by their tables: a block that works on neighbours seldom fills its own anew."""
    device = experts.last[0].codes.device

    def tables(expert: int) -> list[int]:
        return [_table_of(each.spec, device).data_ptr() for each in (*experts.first[expert], experts.last[expert])]

    return sorted(range(len(experts.last)), key=tables)


def plan_threads(experts: int) -> int:
    """Whole warps, no more than it takes: they wait for one another."""
    return max(LEAST_PLAN_THREADS, -(-experts // 32) * 32)


def _most_slots(first: _Products, last: _Products) -> int:
    """Of a pass, one at least: a slot may be a run of its own."""
    a_slot = _slot_bytes(first, last)
    return max(1, min(ROOM_BYTES // sum(a_slot.values()), MOST_COST // max(*first.costs, *last.costs)))


def _slot_bytes(first: _Products, last: _Products) -> dict[str, int]:
    """What lies between the kernels for a slot."""
    return {
        **dict.fromkeys(("ranks", "order"), 4),
        "first": 4 * first.width,
        "inner": 2 * padded_columns(last.inputs),
        "inner_scales": 4,
        "last": 4 * last.width,
    }


class _Place(NamedTuple):
    start: int
    size: int


class _Room:
    """What lies between the kernels of one pass over `tokens`, in one piece of memory."""

    def __init__(
        self,
        tokens: int,
        slots: int,
        experts: int,
        first: _Products,
        last: _Products,
        device: torch.device,
        stream: int,
    ) -> None:
        runs = min(slots, slots // RUN + min(slots, experts))
        sizes = {
            "plan": PLAN_BYTES,
            "runs": RUN_BYTES * runs,
            "x": 2 * tokens * padded_columns(first.inputs),
            "x_scales": 4 * tokens,
            **{name: slots * size for name, size in _slot_bytes(first, last).items()},
        }
        starts = accumulate((-(-size // 256) * 256 for size in sizes.values()), initial=0)
        self._places = {name: _Place(start, size) for (name, size), start in zip(sizes.items(), starts, strict=False)}
        end = max(place.start + place.size for place in self._places.values())
        self._memory = scratch(device, stream, end)
        base = self._memory.data_ptr()
        self.addresses = {name: base + place.start for name, place in self._places.items()}
        self.kept: Any = None  # what a class's own gate has made

    def view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        start, size = self._places[name]
        return self._memory[start : start + size].view(dtype).view(shape)


def _offsets(members: Sequence[Sequence[PackedLinear]]) -> list[int]:
    """Of each part's first output in a row of its expert's."""
    return [
        offset
        for parts in members
        for offset in list(accumulate((part.out_features for part in parts), initial=0))[:-1]
    ]


def _decoder(spec: str) -> DecoderSpec:
    found = decoder_spec(spec)
    assert found is not None, "takes() said no"
    return found


def _bias(bias: torch.Tensor | None) -> tuple[int, int]:
    """Its address and type; 0 where there is none."""
    if bias is None:
        return 0, 0
    return bias.data_ptr(), TYPES[bias.dtype]


@lru_cache(maxsize=1024)
def _table_of(spec: str, device: torch.device) -> torch.Tensor:
    """`entries`, the same tensor for all specs whose tables are alike: a block that finds its table there keeps it."""
    own = entries(spec, device)
    key = (device, own.cpu().numpy().tobytes())
    return _tables.setdefault(key, own)


_tables: dict[tuple[torch.device, bytes], torch.Tensor] = {}
