"""The contract on a CPU: a vectorised trellis search, and products whose weights are decoded in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from qpalette.backends.cpu.experts import CpuExperts, takes
from qpalette.backends.cpu.layout import LAYOUT, from_layout, tile_rows, to_layout
from qpalette.backends.cpu.product import CpuProduct, rotated_weight
from qpalette.backends.cpu.streams import CpuStream
from qpalette.backends.cpu.threads import parallel_caller
from qpalette.backends.cpu.viterbi import encode_states
from qpalette.codes import parse_spec
from qpalette.runtime import TILES, Backend, ExpertsProduct, PackedExperts, PackedLinear, Product, Verdict


class CpuBackend(Backend):
    name = "cpu"
    priority = 10
    layout = LAYOUT
    fuses = True
    stream = CpuStream

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
        with parallel_caller():
            values = search.values(tiles.device).numpy()
            states = encode_states(tiles.numpy(), np.array(search.shifts), values, search.memory)
        return search.pack(torch.from_numpy(states))

    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).decode(codes)

    def to_layout(self, codes: torch.Tensor, spec: str) -> torch.Tensor:
        return to_layout(codes, spec)

    def from_layout(self, codes: torch.Tensor, spec: str, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return from_layout(codes, spec, *stored_shape)

    def tile_rows(
        self, codes: torch.Tensor, rows: torch.Tensor, spec: str, stored_shape: tuple[int, int, int]
    ) -> torch.Tensor:
        return tile_rows(codes, rows, spec, stored_shape[1])

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return self.product([packed])(x)[0]

    def linears(self, x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
        return torch.cat(self.product(members)(x), dim=1)

    def product(self, members: Sequence[PackedLinear]) -> Product:
        if any(member.layout == TILES for member in members):
            return lambda x: CpuProduct([_laid_out(member) for member in members])(x)
        return CpuProduct(members)

    def experts(self, experts: PackedExperts) -> ExpertsProduct:
        first, last = (
            [[_laid_out(each) for each in matrices] for matrices in experts.first],
            map(_laid_out, experts.last),
        )
        prepared = replace(experts, first=first, last=list(last))
        return CpuExperts(prepared) if takes(prepared) else super().experts(prepared)

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        return rotated_weight(_laid_out(packed))


def _laid_out(packed: PackedLinear) -> PackedLinear:
    return packed.with_(codes=to_layout(packed.codes, packed.spec)) if packed.layout == TILES else packed
