"""The contract on a CUDA device: trellis search, rotation, and products with packed weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qpalette.backends.cuda.decoder import decoder_spec
from qpalette.backends.cuda.layout import LAYOUT, from_chunks, to_chunks
from qpalette.backends.cuda.multiply import MOST_BATCH, MOST_SEGMENTS, batch_columns, multiply
from qpalette.backends.cuda.rotate import rotate
from qpalette.backends.cuda.trellis_encoder import encode_states
from qpalette.backends.cuda.unpack import multiply_by_library
from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles
from qpalette.core.records import tiles_of
from qpalette.runtime import Backend, PackedLinear, Verdict

# Above so many tokens matrices are decoded and multiplied by cuBLAS; below, MOST_BATCH tokens a launch. On an H100, a
# matrix of 4096 x 4096 at 3.25 bits: 9.8 us a launch of 16 tokens; decoded 30.4 us for 32 tokens, 31.0 for 64, 43.5 for
# 256 (benchmarks/results/gemv.json).
MOST_FUSED_TOKENS = 48


class CudaBackend(Backend):
    name = "cuda"
    priority = 20
    layout = LAYOUT
    fuses = True

    def supports(self, operation: str, spec: str, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return Verdict(False, f"runs on cuda, not on {device.type}")
        if operation == "encode" and parse_spec(spec).search is None:
            return Verdict(False, f"has no encoder for the family '{parse_spec(spec).family}'")
        if operation == "linear" and decoder_spec(spec) is None:
            return Verdict(False, f"has no decoder for the family '{parse_spec(spec).family}'")
        return Verdict(True)

    def encode(self, spec: str, tiles: torch.Tensor) -> torch.Tensor:
        search = parse_spec(spec).search
        assert search is not None, "supports() said no"
        with torch.cuda.device(tiles.device):
            return search.pack(encode_states(tiles.contiguous(), search).long())

    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).decode(codes)

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return self.linears(x, [packed])

    def linears(self, x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
        with torch.cuda.device(x.device):  # launches go to the current one
            return self._linears(x, members)

    def _linears(self, x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
        diagonal, rotation, tokens = members[0].diagonal, members[0].rotation, len(x)
        if tokens == 0:
            return x.new_empty(0, sum(member.out_features for member in members))
        if tokens > MOST_FUSED_TOKENS:
            return multiply_by_library(rotate(x, diagonal, rotation, None), members, x.dtype)
        if tokens > MOST_BATCH:
            return torch.cat([self._linears(part, members) for part in x.split(MOST_BATCH)])
        rotated = rotate(x, diagonal, rotation, batch_columns(tokens))
        parts = [
            multiply(rotated, tokens, members[i : i + MOST_SEGMENTS], x.dtype)
            for i in range(0, len(members), MOST_SEGMENTS)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        quantizer = parse_spec(packed.spec)
        rows, columns, words = len(packed.codes), tiles_of(packed.in_features), quantizer.words_per_tile
        codes = self.from_layout(packed.codes, (rows, columns, words)).reshape(-1, words)
        tiles = self.decode(packed.spec, codes).reshape(rows, columns, -1)
        unscaled = from_tiles(tiles, packed.out_features, packed.in_features)
        return unscaled * packed.scales.view(torch.float16).float()[:, None]

    def to_layout(self, codes: torch.Tensor) -> torch.Tensor:
        return to_chunks(codes)

    def tile_rows(self, codes: torch.Tensor, rows: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return from_chunks(codes[rows], (len(rows), *stored_shape[1:]))

    def from_layout(self, codes: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return from_chunks(codes, stored_shape)
