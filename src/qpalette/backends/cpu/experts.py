"""The experts of a layer, prepared: addresses of all their matrices, and one compiled call for each step of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np
import torch

from qpalette.backends.cpu import expert_kernels as kernels
from qpalette.backends.cpu.calls import address_of
from qpalette.backends.cpu.operands import LAUNCH, MATRIX
from qpalette.backends.cpu.product import Multiplier, describe, multiplier_of, wants_bytes
from qpalette.backends.cpu.threads import parallel_caller, present_threads
from qpalette.backends.cpu.transform import factors_of
from qpalette.runtime import Gate, PackedExperts, PackedLinear, in_one_basis

_FUNCTIONS = {
    "silu": kernels.SILU,
    "gelu": kernels.GELU,
    "gelu_tanh": kernels.GELU_TANH,
    "relu2": kernels.RELU2,
}


def takes(experts: PackedExperts) -> bool:
    """Whether one rotation serves an expert's first matrices, and each projection has one, which is compiled."""
    projections = [matrix for matrices in experts.first for matrix in matrices], experts.last
    return all(map(in_one_basis, experts.first)) and all(
        len({matrix.rotation for matrix in matrices}) == 1
        and factors_of(matrices[0].rotation, matrices[0].in_features) is not None
        for matrices in projections
    )


class CpuExperts:
    """x [N, K], index [N, k], weights [N, k] -> [N, K], an `ExpertsProduct`; in float32, and rounded once, but for
    products in bytes, where `CpuProduct` would make them so.

    The matrices are laid out in lanes. What is written into their tensors is seen by the next call; which experts share
    a diagonal is not asked again.
    """

    def __init__(self, experts: PackedExperts) -> None:
        self._experts = experts
        self._first, self._last = _Projection(experts.first), _Projection([[last] for last in experts.last])

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        experts, threads = self._experts, present_threads()
        routes, shares = index.long().contiguous().numpy().reshape(-1), weights.float().contiguous().numpy()
        result = torch.empty(x.shape, dtype=torch.float32)
        in_bytes = wants_bytes(x.dtype)
        with parallel_caller():
            slots, runs = kernels.plan(routes, len(experts.last))
            owners = routes[slots]
            first = self._first(
                x.float().contiguous().numpy(), slots // index.shape[1], owners, runs, threads, in_bytes
            )
            inner = self._gated(_biased(first, experts.first_bias, owners), x.dtype, threads)
            outputs = self._last(inner, np.arange(len(slots)), owners, runs, threads, in_bytes)
            kernels.combine(_biased(outputs, experts.last_bias, owners), slots, shares, result.numpy())
        return result.to(x.dtype)

    def _gated(self, first: np.ndarray, dtype: torch.dtype, threads: int) -> np.ndarray:
        gate = self._experts.gate
        if not isinstance(gate, Gate):
            return gate(torch.from_numpy(first).to(dtype)).float().contiguous().numpy()
        out = np.empty((len(first), self._last.inputs), np.float32)
        limit = np.float32(inf if gate.limit is None else gate.limit)
        numbers = limit, np.float32(gate.alpha), np.float32(gate.offset)
        kernels.activate(first, _FUNCTIONS[gate.function], gate.gated, gate.interleaved, *numbers, out, threads)
        return out


class _Table(NamedTuple):
    """By expert and part: MATRIX, and the address of the kernel that multiplies by it; what the former points to."""

    matrices: np.ndarray
    linears: np.ndarray
    kept: list[Multiplier]


class _Projection:
    """Matrices [experts][parts] of one number of inputs and one rotation."""

    def __init__(self, members: Sequence[Sequence[PackedLinear]]) -> None:
        first, flat = members[0][0], [member for parts in members for member in parts]
        self.inputs, self._rows = first.in_features, sum(member.out_features for member in members[0])
        self._factors = factors_of(first.rotation, first.in_features)
        self._shape, self._flat = (len(members), len(members[0])), flat
        self._tables: dict[bool, _Table] = {}
        self._shared = in_one_basis(flat)
        self._diagonals = np.array([parts[0].diagonal.data_ptr() for parts in members])
        self._has_signs = np.array([parts[0].diagonal.dtype == torch.uint8 for parts in members])
        self._signs = np.zeros(-(-self.inputs // 8), np.uint8)
        self._unrotated = _launch_of(self.inputs, self._signs)
        # What the addresses are of, also where a tensor's data is exchanged.
        kept = [(each.codes, each.scales, each.diagonal) for each in flat]
        self._kept = [tensor.detach() for tensors in kept for tensor in tensors]

    def __call__(
        self, x: np.ndarray, sources: np.ndarray, owners: np.ndarray, runs: np.ndarray, threads: int, in_bytes: bool
    ) -> np.ndarray:
        """x float32 [., K]; for each place the row of x and its expert, int64 -> float32 [places, rows]. `in_bytes`:
        where codes allow it."""
        rotated = self._rotated(x, sources, owners, threads)
        out = np.empty((len(sources), self._rows), np.float32)
        matrices, linears, _ = self._table(in_bytes)
        kernels.products(self._unrotated, matrices, linears, runs, rotated, out, threads)
        return out

    def _table(self, in_bytes: bool) -> _Table:
        if in_bytes not in self._tables:
            multipliers = [multiplier_of(member.spec, in_bytes) for member in self._flat]
            matrices = np.zeros(len(multipliers), MATRIX)
            for matrix, member, multiplier in zip(matrices, self._flat, multipliers, strict=True):
                describe(matrix, member, multiplier)
            linears = np.array([address_of(multiplier.linear) for multiplier in multipliers])
            self._tables[in_bytes] = _Table(matrices.reshape(self._shape), linears.reshape(self._shape), multipliers)
        return self._tables[in_bytes]

    def _rotated(self, x: np.ndarray, sources: np.ndarray, owners: np.ndarray, threads: int) -> np.ndarray:
        """Once for each row of x where all experts read it in one basis."""
        if self._shared:
            rows, owners = np.arange(len(x)), np.zeros(len(x), np.int64)
        else:
            rows = sources
        out = np.empty((len(rows), self.inputs), np.float32)
        kernels.rotate(x, rows, self._diagonals[owners], self._has_signs[owners], self._factors, out, threads)
        return out[sources] if self._shared else out


def _launch_of(features: int, signs: np.ndarray) -> np.ndarray:
    """A LAUNCH of one matrix to come, whose input is rotated already: no factors, and `signs`, which are all plus."""
    launch = np.zeros(1, LAUNCH)
    launch["features"], launch["scale"], launch["members"] = features, 1, 1
    launch["diagonal"], launch["has_signs"] = signs.ctypes.data, True
    return launch


def _biased(values: np.ndarray, bias: torch.Tensor | None, owners: np.ndarray) -> np.ndarray:
    return values if bias is None else values + bias.detach().float().numpy()[owners]
