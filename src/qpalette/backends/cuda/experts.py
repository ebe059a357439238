"""The experts of a layer on a CUDA device, prepared: a few launches, and the host never waits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import inf
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
GATE_THREADS = 256
ROOM_BYTES = 1 << 27  # of what lies between the kernels of a pass
MOST_COST = (1 << 31) - 1  # of a pass: kernels count in 32 bits
COSTS_OF_A_TILE = 4  # decode_cost in quarters: whole numbers
FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}

# As in experts.cu and experts.cuh.
MATRIX = np.dtype(
    [
        *((name, np.uint64) for name in ("codes", "entries", "scales")),
        *((name, np.int32) for name in ("row_tiles", "rows", "out_offset", "decoder", "cost", "before")),
        ("hash_unit", np.uint32),
    ],
    align=True,
)
RUN_BYTES, PLAN_BYTES = 20, 16
STATE_ROWS = 3  # row tiles in the place of whose sums is a block's state


class Projection(ctypes.Structure):
    """As in experts.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrices", "runs", "plan", "x", "x_scales", "x_rows", "y", "entries")),
        *((name, ctypes.c_int) for name in ("parts", "chunks", "y_stride", "index", "decoder", "most_rows")),
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
        self._first = _Products(experts.first, 0)
        self._last = _Products([[matrix] for matrix in experts.last], 1)
        costs = torch.tensor([self._first.costs, self._last.costs], dtype=torch.int32)
        self._costs = costs.to(self._device)
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
        launches.plan.start(
            (1, 1),
            [index.data_ptr(), slots, ranks, self._count, self._costs.data_ptr()],
            [addresses[name] for name in ("tokens", "owners", "positions", "runs", "plan")],
            stream,
        )
        launches.rotate_x.start(len(x), aligned(x).data_ptr(), addresses["x"], addresses["x_scales"], stream)
        self._first.start(room, "x", "tokens", "first", stream)
        inner = self._inner(launches, room, slots, stream)
        launches.rotate_inner.start(
            slots, inner, addresses["inner_rotated"], addresses["inner_scales"], stream, addresses["owners"]
        )
        self._last.start(room, "inner_rotated", None, "last", stream)
        bias = _bias(self._biases[1])
        launches.combine.start(
            (len(x), -(-self._last.width // GATE_THREADS)),
            [addresses["last"], addresses["positions"], addresses["owners"]],
            [weights.data_ptr(), TYPES[weights.dtype], *bias, ranks, self._last.width, y.data_ptr(), TYPES[y.dtype]],
            stream,
        )

    def _inner(self, launches: _Launches, room: _Room, slots: int, stream: int) -> int:
        """The address of what the last matrices read, float32 [positions, I]; by torch, where the gate is a class's."""
        addresses, columns = room.addresses, self._last.inputs
        if launches.gate is None:
            first = room.view("first", (slots, self._first.width))
            if self._biases[0] is not None:
                first = first + self._biases[0][room.view("owners", (slots,), torch.int32).long()]
            room.kept = self._gate(first.to(launches.dtype)).float().contiguous()
            return room.kept.data_ptr()
        gate = self._gated
        assert gate is not None
        limit = inf if gate.limit is None else gate.limit
        launches.gate.start(
            (slots, -(-columns // GATE_THREADS)),
            [addresses["first"], addresses["inner"], addresses["plan"], addresses["owners"]],
            [*_bias(self._biases[0]), columns, limit, gate.alpha, gate.offset],
            stream,
        )
        return addresses["inner"]


class _Products:
    """What all experts multiply by, first or last: matrices [experts][parts] of one number of inputs."""

    def __init__(self, members: Sequence[Sequence[PackedLinear]], index: int) -> None:
        flat = [matrix for parts in members for matrix in parts]
        device = flat[0].codes.device
        limits = device_limits(device.index or 0)
        self.inputs, self.width = flat[0].in_features, sum(matrix.out_features for matrix in members[0])
        self.rotation, self.diagonals = flat[0].rotation, [parts[0].diagonal for parts in members]
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
            row["decoder"], row["cost"] = place_of[spec], round(COSTS_OF_A_TILE * decode_cost(spec))
            row["hash_unit"] = spec.hash_unit(limits.table_bytes)
        tables, first_places, uses = np.unique(table["entries"], return_index=True, return_counts=True)
        common = int(uses.argmax())
        costs = (table["row_tiles"].astype(np.int64) * table["cost"]).reshape(len(members), -1)
        table["before"] = (costs.cumsum(1) - costs).reshape(-1)
        self.costs = costs.sum(1).tolist()
        self._table = torch.from_numpy(table.view(np.uint8)).to(device)
        # What the addresses are of, also where a tensor's data is exchanged.
        self._kept = [tensor.detach() for matrix in flat for tensor in (matrix.codes, matrix.scales, matrix.diagonal)]
        rows = most_rows(limits, RUN) - STATE_ROWS
        self._problem = Projection(
            matrices=self._table.data_ptr(),
            parts=len(members[0]),
            chunks=flat[0].codes.shape[1],
            y_stride=self.width,
            index=index,
            entries=int(tables[common]),
            decoder=int(table["decoder"][first_places[common]]),
            most_rows=min(rows, max(len(matrix.codes) for matrix in flat)),
            fixed_point=fixed_point(self.inputs),
        )
        room = limits.table_bytes + (STATE_ROWS + self._problem.most_rows) * sum_bytes(RUN)
        self._launch = KernelLaunch(kernel, limits.multiprocessors, THREADS, room, [self._problem], limits.overlap)

    def start(self, room: _Room, x: str, rows: str | None, y: str, stream: int) -> None:
        problem, addresses = self._problem, room.addresses
        problem.runs, problem.plan = addresses["runs"], addresses["plan"]
        problem.x, problem.x_scales = addresses[x], addresses[f"{x.removesuffix('_rotated')}_scales"]
        problem.x_rows, problem.y = None if rows is None else addresses[rows], addresses[y]
        self._launch.start(stream)


class _Launches:
    """The kernels around the products, for tokens of one type."""

    def __init__(self, experts: CudaExperts, dtype: torch.dtype) -> None:
        first, last, gate = experts._first, experts._last, experts._gated
        index = experts._device.index or 0
        overlap = device_limits(index).overlap
        self.dtype = dtype
        self.plan = _Launch("plan_runs", {"THREADS": plan_threads(experts._count)}, "pnnnp" + "ppppp", index, overlap)
        self.combine = _Launch("combine", {"THREADS": GATE_THREADS}, "ppppnpnnnpn", index, overlap)
        self.gate = None
        if gate is not None:
            constants = {"FUNCTION": FUNCTIONS[gate.function], "GATED": int(gate.gated)}
            macros = {"THREADS": GATE_THREADS, "INTERLEAVED": int(gate.gated and gate.interleaved)} | constants
            self.gate = _Launch("gate", macros, "pppppnnfff", index, overlap)
        # One way to cut a rotation for any number of tokens: a token's norm is summed up in one order.
        alike: dict[str, Any] = {"tokens": MOST_OF_A_FEW_TOKENS, "batch": 1, "overlap": overlap}
        self.rotate_x = RotationLaunch(first.rotation, first.diagonals[0], first.inputs, dtype=dtype, **alike)
        table = torch.tensor([each.data_ptr() for each in last.diagonals]).to(experts._device)
        self.rotate_inner = RotationLaunch(
            last.rotation, last.diagonals[0], last.inputs, dtype=torch.float32, table=table, **alike
        )


class _Launch:
    """A kernel of routes.cu; `types` of its arguments: p an address, n an int, f a float."""

    def __init__(self, name: str, macros: dict[str, int], types: str, device: int, overlap: bool) -> None:
        kinds: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_int, "f": ctypes.c_float}
        self._arguments = [kinds[each]() for each in types]
        kernel = load_kernel(ROUTES_SOURCE, name, macros, device)
        self._launch = KernelLaunch(kernel, 1, macros["THREADS"], 0, self._arguments, overlap)

    def start(self, grid: tuple[int, int], some: Sequence[Any], more: Sequence[Any], stream: int) -> None:
        for argument, value in zip(self._arguments, (*some, *more), strict=True):
            argument.value = value
        self._launch.grid = (*grid, 1)
        self._launch.start(stream)


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
        **dict.fromkeys(("tokens", "owners", "positions"), 4),
        "first": 4 * first.width,
        "inner": 4 * last.inputs,
        "inner_rotated": 2 * padded_columns(last.inputs),
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
