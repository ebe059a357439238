"""The contract on a CUDA device. Encodes trellis codes; products are still left to the reference backend."""

from __future__ import annotations

import torch

from qpalette.backends.cuda.trellis_encoder import encode_states
from qpalette.core.errors import UnsupportedError
from qpalette.kernels import Backend, PackedLinear, Verdict
from qpalette.quantizers import parse_spec
from qpalette.quantizers.trellis import Trellis


class CudaBackend(Backend):
    name = "cuda"
    priority = 20

    def supports(self, operation: str, spec: str, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return Verdict(False, f"runs on cuda, not on {device.type}")
        if operation != "encode":
            return Verdict(False, f"has no kernel for '{operation}'")
        if not isinstance(parse_spec(spec), Trellis):
            return Verdict(False, f"has no encoder for the family '{parse_spec(spec).family}'")
        return Verdict(True)

    def encode(self, spec: str, tiles: torch.Tensor) -> torch.Tensor:
        quantizer = parse_spec(spec)
        assert isinstance(quantizer, Trellis), "supports() said no"
        states = encode_states(
            tiles.contiguous(), quantizer.shifts(), quantizer.state_values_on(tiles.device), quantizer.memory
        )
        return quantizer.pack_states(states.long())

    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).decode(codes)

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        raise UnsupportedError("the cuda backend has no kernel for 'linear'")

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        raise UnsupportedError("the cuda backend has no kernel for 'linear'")
