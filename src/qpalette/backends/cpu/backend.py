"""The contract on a CPU: a vectorised trellis search, and products whose weights are decoded in registers."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from qpalette.backends.cpu.decoders import decoder_of
from qpalette.backends.cpu.layout import from_lanes, to_lanes
from qpalette.backends.cpu.matmul import make_kernels
from qpalette.backends.cpu.transform import Transform, make_transform
from qpalette.backends.cpu.viterbi import encode_states
from qpalette.core.records import TILE, tiles_of
from qpalette.kernels import TILES, Backend, PackedLinear, Verdict
from qpalette.quantizers import parse_spec
from qpalette.quantizers.trellis import Trellis

LARGEST_FUSED_BATCH = 16  # above, decoding the matrix once and the vendor's product win

_one_caller = threading.Lock()  # numba's default thread pool may not be entered twice at the same time


class Kernels(NamedTuple):
    multiply: Any
    dequantize: Any
    parameters: np.ndarray


@lru_cache(maxsize=256)
def _kernels(spec: str) -> Kernels:
    quantizer = parse_spec(spec)
    found = decoder_of(quantizer)
    assert found is not None, "supports() said no"
    return Kernels(*make_kernels(found.decode, found.pattern), found.parameters)


class CpuBackend(Backend):
    name = "cpu"
    priority = 10
    layout = "cpu-lanes"

    def supports(self, operation: str, spec: str, device: torch.device) -> Verdict:
        quantizer = parse_spec(spec)
        if device.type != "cpu":
            return Verdict(False, f"runs on the cpu, not on {device.type}")
        if decoder_of(quantizer) is None:
            return Verdict(False, f"has no decoder for the family '{quantizer.family}'")
        return Verdict(True)

    def encode(self, spec: str, tiles: torch.Tensor) -> torch.Tensor:
        quantizer = parse_spec(spec)
        if not isinstance(quantizer, Trellis):
            return quantizer.encode(tiles)  # a table search: torch is already fast
        with _one_caller:
            _use_torch_threads()
            states = encode_states(
                tiles.numpy(), quantizer.shifts().numpy(), quantizer.state_values().numpy(), quantizer.memory
            )
        return quantizer.pack_states(torch.from_numpy(states))

    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).decode(codes)

    def to_layout(self, codes: torch.Tensor) -> torch.Tensor:
        return to_lanes(codes)

    def from_layout(self, codes: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return from_lanes(codes, *stored_shape)

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, packed.out_features)
        with _one_caller:
            _use_torch_threads()
            rotated = _transform(packed.rotation, packed.in_features).apply(x, packed.signs)
        if x.shape[0] > LARGEST_FUSED_BATCH:
            weight = self.rotated_weight(packed).to(x.dtype)
            return torch.from_numpy(rotated[:, : packed.in_features]).to(x.dtype) @ weight.T
        result = torch.empty(x.shape[0], packed.out_features, dtype=torch.float32)
        kernels = _kernels(packed.spec)
        with _one_caller:
            kernels.multiply(*_codes_and_tiles(packed), rotated, _scales(packed), result.numpy(), kernels.parameters)
        return result.to(x.dtype)

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        weight = torch.empty(packed.out_features, packed.in_features, dtype=torch.float32)
        kernels = _kernels(packed.spec)
        with _one_caller:
            _use_torch_threads()
            kernels.dequantize(*_codes_and_tiles(packed), _scales(packed), weight.numpy(), kernels.parameters)
        return weight


_THREADS = numba.get_num_threads()  # all that numba started; it can use fewer, never more


def _use_torch_threads() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), _THREADS))


def _codes_and_tiles(packed: PackedLinear) -> tuple[np.ndarray, int, int]:
    codes = to_lanes(packed.codes) if packed.layout == TILES else packed.codes
    return codes.numpy(), tiles_of(packed.out_features), tiles_of(packed.in_features)


def _scales(packed: PackedLinear) -> np.ndarray:
    return packed.scales.view(torch.float16).float().numpy()


@lru_cache(maxsize=1024)
def _transform(rotation: str, dim: int) -> Transform:
    return make_transform(rotation, dim, padded=tiles_of(dim) * TILE)
