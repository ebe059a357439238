"""What `decoder.cuh` needs to know of a quantizer: a table, and the way to an index into it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qpalette.codes.base import Quantizer, parse_spec
from qpalette.codes.nuq import NonUniform
from qpalette.codes.tcq import TrellisCoded
from qpalette.codes.tcq2 import TrellisCodedPairs
from qpalette.codes.vq import VectorQuantized
from qpalette.core.records import TILE_WEIGHTS

COMMON_SOURCE = Path(__file__).with_name("common.cuh").read_text()
SOURCE = COMMON_SOURCE + Path(__file__).with_name("decoder.cuh").read_text()
MOST_PAIR_BITS = 6  # nuq: up to here a look-up gives two weights; a table of all pairs of more levels does not fit
_COPIES_BYTES = 4 * 32  # of an entry with a copy in each bank


@dataclass(frozen=True)
class DecoderSpec:
    """The template arguments of `Decoder`: see decoder.cuh."""

    eighths: int
    values: int
    index_bits: int
    memory: int
    hashed: bool

    @property
    def type_name(self) -> str:
        hashed = "true" if self.hashed else "false"
        return f"Decoder<{self.eighths}, {self.values}, {self.index_bits}, {self.memory}, {hashed}>"

    @property
    def chunk_words(self) -> int:
        """32-bit words of a chunk: 16 tiles."""
        return 16 * self.eighths

    def hash_unit(self, table_bytes: int) -> int:
        """What moves the hash so that the index is a byte offset; 1 where `decode` shifts it down instead."""
        copies = min(32, table_bytes // (4 << self.index_bits))
        shift = (4 * copies).bit_length() - 1 - (self.memory - self.index_bits)
        return 1 << max(0, shift) if self.hashed else 1


@lru_cache(maxsize=1024)
def decoder_spec(spec: str) -> DecoderSpec | None:
    """None for a family that has no decoder here."""
    quantizer = parse_spec(spec)
    eighths = quantizer.words_per_tile * 32 * 8 // TILE_WEIGHTS
    match quantizer:
        case TrellisCoded():
            return DecoderSpec(eighths, 1, quantizer.codebook_bits, quantizer.memory, True)
        case TrellisCodedPairs():
            return DecoderSpec(eighths, 2, quantizer.codebook_bits + 1, quantizer.memory, True)
        case VectorQuantized():
            return DecoderSpec(eighths, 2, quantizer.index_bits, quantizer.index_bits, False)
        case NonUniform():
            values = 2 if quantizer.bits <= MOST_PAIR_BITS else 1
            return DecoderSpec(eighths, values, quantizer.bits * values, quantizer.bits * values, False)
    return None


@lru_cache(maxsize=1024)
def with_decoders(source: str, decoders: tuple[DecoderSpec, ...]) -> str:
    """`source` behind the decoders that it uses. Kept: a launch hashes its source, once for each object (6 us)."""
    names = ", ".join(decoder.type_name for decoder in decoders)
    return f"#define DECODERS {names}\n{SOURCE}\n{source}"


@lru_cache(maxsize=1024)
def entries(spec: str, device: torch.device) -> torch.Tensor:
    """The table on `device`: int32 [2^index_bits], one or two float16, the first weight in the low half."""
    return _pack(_values(parse_spec(spec))).to(device)


def _values(quantizer: Quantizer) -> torch.Tensor:
    """float32 [2^index_bits, weights per entry]."""
    match quantizer:
        case TrellisCoded():
            return quantizer.codebook()[:, None]
        case TrellisCodedPairs():
            points = quantizer.codebook()
            return torch.cat([points, -points])
        case VectorQuantized():
            return quantizer.codebook()
        case NonUniform():
            levels = quantizer.codebook()
            return torch.cartesian_prod(levels, levels) if quantizer.bits <= MOST_PAIR_BITS else levels[:, None]
    raise AssertionError(f"{quantizer} has no decoder: supports() said no")


def _pack(values: torch.Tensor) -> torch.Tensor:
    halves = values.half().view(torch.int16)
    if halves.shape[1] == 1:
        halves = torch.cat([halves, torch.zeros_like(halves)], dim=1)
    return halves.contiguous().view(torch.int32)[:, 0].contiguous()
