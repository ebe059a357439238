"""The contract on a CPU: a vectorised trellis search, and products whose weights are decoded in registers."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from qpalette.backends.cpu.decoders import Arrays, decoder_of
from qpalette.backends.cpu.layout import from_lanes, tile_rows, to_lanes
from qpalette.backends.cpu.matmul import make_kernels
from qpalette.backends.cpu.transform import factors_of
from qpalette.backends.cpu.viterbi import encode_states
from qpalette.codes import parse_spec
from qpalette.rotate import Rotation, diagonal_of
from qpalette.runtime import TILES, Backend, PackedLinear, Verdict

LARGEST_FUSED_BATCH = 16  # above, decoding the matrix once and the vendor's product win
LEAST_PRODUCTS = 1 << 17  # per thread: some 12 microseconds of work, several times what waking a thread costs

_one_caller = threading.Lock()  # numba's default thread pool may not be entered twice at the same time


class Kernels(NamedTuple):
    linear: Any
    dequantize: Any
    arrays: Arrays


@lru_cache(maxsize=256)
def _kernels(spec: str) -> Kernels:
    way, arrays = decoder_of(parse_spec(spec))
    return Kernels(*make_kernels(way), arrays)


class CpuBackend(Backend):
    name = "cpu"
    priority = 10
    layout = "cpu-lanes"

    def supports(self, operation: str, spec: str, device: torch.device) -> Verdict:
        if device.type != "cpu":
            return Verdict(False, f"runs on the cpu, not on {device.type}")
        if operation == "linear" and parse_spec(spec).decoder is None:
            return Verdict(False, f"has no decoder for the family '{parse_spec(spec).family}'")
        return Verdict(True)

    def encode(self, spec: str, tiles: torch.Tensor) -> torch.Tensor:
        quantizer = parse_spec(spec)
        search = quantizer.search
        if search is None:
            return quantizer.encode(tiles)  # a table search: torch is already fast
        with _one_caller:
            numba.set_num_threads(_threads())
            values = search.values(tiles.device).numpy()
            states = encode_states(tiles.numpy(), np.array(search.shifts), values, search.memory)
        return search.pack(torch.from_numpy(states))

    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).decode(codes)

    def to_layout(self, codes: torch.Tensor) -> torch.Tensor:
        return to_lanes(codes)

    def from_layout(self, codes: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return from_lanes(codes, *stored_shape)

    def tile_rows(self, codes: torch.Tensor, rows: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return tile_rows(codes, rows, stored_shape[1])

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        factors = factors_of(packed.rotation, packed.in_features)
        if x.shape[0] > LARGEST_FUSED_BATCH or factors is None:
            rotation = Rotation.parse(packed.rotation, packed.in_features)
            rotated = rotation.apply(x.float() * diagonal_of(packed.diagonal, packed.in_features))
            return rotated.to(x.dtype) @ self.rotated_weight(packed).to(x.dtype).T
        work, signs = x.detach().float(), packed.diagonal
        if signs.dtype != torch.uint8:
            work = work * diagonal_of(signs, packed.in_features)
            signs = torch.zeros(-(-packed.in_features // 8), dtype=torch.uint8)
        result = torch.empty(x.shape[0], packed.out_features, dtype=torch.float32)
        kernels = _kernels(packed.spec)
        with _one_caller:
            kernels.linear(
                work.contiguous().numpy(),
                signs.numpy(),
                factors,
                _codes(packed),
                packed.scales.numpy(),
                _threads(x.shape[0] * packed.in_features * packed.out_features),
                result.numpy(),
                *kernels.arrays,
            )
        return result.to(x.dtype)

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        weight = torch.empty(packed.out_features, packed.in_features, dtype=torch.float32)
        kernels = _kernels(packed.spec)
        with _one_caller:
            numba.set_num_threads(_threads())
            kernels.dequantize(_codes(packed), packed.scales.numpy(), weight.numpy(), *kernels.arrays)
        return weight


_POOL = numba.get_num_threads()  # all that numba started; it can use fewer, never more


def _threads(products: int = 1 << 62) -> int:
    """As many as torch uses, but no more than have LEAST_PRODUCTS each to do."""
    return max(1, min(torch.get_num_threads(), _POOL, products // LEAST_PRODUCTS))


def _codes(packed: PackedLinear) -> np.ndarray:
    return (to_lanes(packed.codes) if packed.layout == TILES else packed.codes).numpy()
