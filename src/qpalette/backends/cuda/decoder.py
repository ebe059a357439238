"""What `decoder.cuh` needs to know of a quantizer: a table, and the way to an index into it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qpalette.codes import parse_spec
from qpalette.codes.description import Decoder
from qpalette.runtime.prefill import weights_in_int8

COMMON_SOURCE = Path(__file__).with_name("common.cuh").read_text(encoding="utf-8")
SOURCE = COMMON_SOURCE + Path(__file__).with_name("decoder.cuh").read_text(encoding="utf-8")
MOST_PAIR_BITS = 6  # of a scalar index: up to here a look-up gives two weights; more pairs do not fit
_COPIES_BYTES = 4 * 32  # of an entry with a copy in each bank


@dataclass(frozen=True, order=True)
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
    """None for a code that does not say how it is decoded."""
    decoder = parse_spec(spec).decoder
    if decoder is None:
        return None
    pairs = 2 if _in_pairs(decoder) else 1
    return DecoderSpec(
        decoder.lane_bits, pairs * decoder.width, pairs * decoder.index_bits, pairs * decoder.memory, decoder.hashed
    )


def _in_pairs(decoder: Decoder) -> bool:
    """Whether one look-up gives two weights that the code looks up one by one."""
    return not decoder.hashed and decoder.width == 1 and decoder.index_bits <= MOST_PAIR_BITS


@lru_cache(maxsize=1024)
def with_decoders(source: str, decoders: tuple[DecoderSpec, ...]) -> str:
    """`source` behind the decoders that it uses. Kept: a launch hashes its source, once for each object (6 us)."""
    names = ", ".join(decoder.type_name for decoder in decoders)
    return f"#define DECODERS {names}\n{SOURCE}\n{source}"


@lru_cache(maxsize=1024)
def entries(spec: str, device: torch.device, in_int8: bool = False) -> torch.Tensor:
    """The table on `device`: int32 [2^index_bits], one or two float16, the first weight in the low half; or bytes, each
    in the place of one."""
    quantizer = parse_spec(spec)
    values, decoder = quantizer.entries(), quantizer.decoder
    assert decoder is not None, "supports() said no"
    if in_int8:
        values = weights_in_int8(values, spec).numbers
    if _in_pairs(decoder):
        values = torch.cartesian_prod(values[:, 0], values[:, 0])
    return _pack(values).to(device)


def _pack(values: torch.Tensor) -> torch.Tensor:
    halves = values.to(torch.int16) & 0xFF if values.dtype == torch.int8 else values.half().view(torch.int16)
    if halves.shape[1] == 1:
        halves = torch.cat([halves, torch.zeros_like(halves)], dim=1)
    return halves.contiguous().view(torch.int32)[:, 0].contiguous()
