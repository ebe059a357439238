"""The contract on a CUDA device: trellis search, rotation, and products with packed weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch

from qpalette.backends.cuda import decoder_sets
from qpalette.backends.cuda.compiler import INSTALL, compiler_is_installed
from qpalette.backends.cuda.decoder import decoder_spec
from qpalette.backends.cuda.layout import LAYOUT, from_chunks, laid_out, to_chunks
from qpalette.backends.cuda.multiply import MOST_BATCH, MOST_SEGMENTS, batch_columns, multiply
from qpalette.backends.cuda.rotate import rotate
from qpalette.backends.cuda.trellis_encoder import encode_states
from qpalette.backends.cuda.unpack import multiply_by_library
from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles
from qpalette.core.records import TILE, tiles_of
from qpalette.runtime import TILES, Backend, PackedLinear, Verdict

logger = logging.getLogger(__name__)
LEAST_CAPABILITY = (8, 0)  # bfloat16, and the matrix instructions of the products
# Above so many tokens matrices are decoded and multiplied by cuBLAS; below, MOST_BATCH tokens a launch. On an H100, a
# matrix of 4096 x 4096 at 3.25 bits: 9.8 us a launch of 16 tokens; decoded 30.4 us for 32 tokens, 31.0 for 64, 43.5 for
# 256 (benchmarks/results/gemv.json).
MOST_FUSED_TOKENS = 48
DECODED_WEIGHTS = 1 << 22  # of W' at a time: decoding by definition takes many times the memory of its result


class CudaBackend(Backend):
    name = "cuda"
    priority = 20
    layout = LAYOUT
    fuses = True

    def supports(self, operation: str, spec: str, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return Verdict(False, f"runs on cuda, not on {device.type}")
        if reason := _missing(device):
            return Verdict(False, reason)
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
            ready = all(member.layout == LAYOUT for member in members)
            return self._linears(x, members if ready else [laid_out(member) for member in members], overlap=ready)

    def _linears(self, x: torch.Tensor, members: Sequence[PackedLinear], overlap: bool) -> torch.Tensor:
        diagonal, rotation, tokens = members[0].diagonal, members[0].rotation, len(x)
        if tokens == 0:
            return x.new_empty(0, sum(member.out_features for member in members))
        if tokens > MOST_FUSED_TOKENS:
            return multiply_by_library(rotate(x, diagonal, rotation, None, overlap=overlap), members, x.dtype)
        if tokens > MOST_BATCH:
            return torch.cat([self._linears(part, members, overlap) for part in x.split(MOST_BATCH)])
        rotated = rotate(x, diagonal, rotation, batch_columns(tokens), overlap=overlap)
        parts = [
            multiply(rotated, tokens, members[i : i + MOST_SEGMENTS], x.dtype)
            for i in range(0, len(members), MOST_SEGMENTS)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        words, columns = parse_spec(packed.spec).words_per_tile, tiles_of(packed.in_features)
        weight = torch.empty(packed.out_features, packed.in_features, device=packed.codes.device)
        step = max(1, DECODED_WEIGHTS // (TILE * packed.in_features))
        for codes, rows in zip(packed.codes.split(step), weight.split(step * TILE), strict=True):
            stored = codes if packed.layout == TILES else from_chunks(codes, (len(codes), columns, words))
            tiles = self.decode(packed.spec, stored.reshape(-1, words)).reshape(len(codes), columns, -1)
            rows.copy_(from_tiles(tiles, *rows.shape))
        return weight.mul_(packed.scales.view(torch.float16).float()[:, None])

    def to_layout(self, codes: torch.Tensor) -> torch.Tensor:
        return to_chunks(codes)

    def expect(self, packed: PackedLinear) -> None:
        decoder = decoder_spec(packed.spec)
        assert decoder is not None, "supports() said no"
        decoder_sets.expect(packed.codes, decoder)

    def tile_rows(self, codes: torch.Tensor, rows: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return from_chunks(codes[rows], (len(rows), *stored_shape[1:]))

    def from_layout(self, codes: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return from_chunks(codes, stored_shape)


def _missing(device: torch.device) -> str:
    """What a CUDA device, or this installation, lacks for the kernels of this folder; empty if nothing."""
    if torch.version.hip is not None:
        return "needs an NVIDIA device, and this torch is for AMD's"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there is no device {device}: torch finds {torch.cuda.device_count()} CUDA device(s)"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "needs compute capability {}.{}, and {} has {}.{}".format(*LEAST_CAPABILITY, device, *capability)
    if not compiler_is_installed():
        _warn_of_no_compiler()
        return f"has no compiler for its kernels: {INSTALL}"
    return ""


@cache
def _warn_of_no_compiler() -> None:
    """Once: the model answers all the same."""
    logger.warning("CUDA kernels cannot be compiled; plain torch does their work, many times slower: %s", INSTALL)
