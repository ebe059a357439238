"""Circular bit streams as 32-bit words: most significant bit first, no padding anywhere.

Bit i of a tile's stream is bit 31 - i % 32 of word i // 32. A tile of 256 weights at a rate of n/8 bits fills
exactly n words, so codes are stored densely at every multiple of 1/8 bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch

WORD = 32


def pack_stream(bits: torch.Tensor) -> torch.Tensor:
    """bits: integer 0/1 [..., 32 n] -> int32 words [..., n]."""
    if bits.shape[-1] % WORD:
        raise ValueError(f"a stream of {bits.shape[-1]} bits does not fill whole {WORD}-bit words")
    lanes = bits.reshape(*bits.shape[:-1], -1, WORD).to(torch.int64)
    place = torch.arange(WORD - 1, -1, -1, device=bits.device)
    return _to_int32((lanes << place).sum(-1))


def unpack_stream(words: torch.Tensor) -> torch.Tensor:
    """int32 words [..., n] -> int64 0/1 bits [..., 32 n]."""
    place = torch.arange(WORD - 1, -1, -1, device=words.device)
    bits = (words.to(torch.int64).unsqueeze(-1) >> place) & 1
    return bits.reshape(*words.shape[:-1], -1)


def pack_fields(fields: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Concatenate unsigned fields [..., steps], each its own width: `widths` [steps] bits, into words [..., n]."""
    field, place = _bit_sources(tuple(widths.tolist()), fields.device)
    return pack_stream((fields.to(torch.int32)[..., field] >> place) & 1)


@lru_cache(maxsize=64)
def _bit_sources(widths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each bit of the stream, the field it comes from and its place there."""
    field = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    place = torch.cat([torch.arange(width - 1, -1, -1) for width in widths])
    return field.to(device), place.to(device, torch.int32)


def windows(words: torch.Tensor, ends: torch.Tensor, length: int) -> torch.Tensor:
    """The `length` (<= 32) stream bits that end before each position of `ends` [steps], on the circle.

    words: int32 [..., n]. Returns int64 [..., steps], the last stream bit lowest.
    """
    last = (ends - 1) % (words.shape[-1] * WORD)
    word, drop = last // WORD, WORD - 1 - last % WORD
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    pair = (unsigned[..., word - 1] << WORD) | unsigned[..., word]  # word -1 is the last one: the stream is a circle
    return (pair >> drop) & ((1 << length) - 1)


def _to_int32(values: torch.Tensor) -> torch.Tensor:
    """Values in [0, 2^32) with the same 32 bits as int32."""
    return torch.where(values >= 1 << (WORD - 1), values - (1 << WORD), values).to(torch.int32)
