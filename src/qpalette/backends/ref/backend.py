"""Every operation of the contract in a few obvious lines of torch."""

from __future__ import annotations

import torch

from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles
from qpalette.rotate import Rotation, diagonal_of
from qpalette.runtime import Backend, PackedLinear, Verdict


class ReferenceBackend(Backend):
    name = "ref"
    priority = 0
    fuses = True

    def supports(self, operation: str, spec: str, device: torch.device) -> Verdict:
        return Verdict(True)

    def encode(self, spec: str, tiles: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).encode(tiles)

    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).decode(codes)

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        rotation = Rotation.parse(packed.rotation, packed.in_features)
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        rotated = rotation.apply(work * diagonal_of(packed.diagonal, packed.in_features))
        return (rotated @ self.rotated_weight(packed).T.to(rotated.dtype)).to(x.dtype)

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        rows, columns, words = packed.codes.shape
        tiles = self.decode(packed.spec, packed.codes.reshape(-1, words)).reshape(rows, columns, -1)
        unscaled = from_tiles(tiles, packed.out_features, packed.in_features)
        return unscaled * packed.scales.view(torch.float16).float()[:, None]
