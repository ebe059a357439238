"""How the CUDA kernels like their codes: a lane's bits of 16 neighbouring tiles together, loads contiguous in a warp.

A chunk is 16 tiles of a row of tiles. Lane i owns bits [n i, n (i + 1)) of each tile's stream, n = 8 R; its n bits of
the 16 tiles follow one another in 16 n bits, most significant first, kept as 32-bit words (an odd n ends in half a
word). The words of all lanes are stored as `Decoder::load` reads them: four words per lane at a time, then two, one,
and half of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qpalette.codes.bits import WORD, pack_stream, unpack_stream
from qpalette.core.errors import UnsupportedError
from qpalette.runtime import TILES, PackedLinear

LAYOUT = "chunks"
CHUNK = 16  # tiles
LANES = 32
_BATCH_BITS = 1 << 27  # a bit takes 8 bytes while it is moved


def laid_out(packed: PackedLinear) -> PackedLinear:
    """The same matrix in this layout: converted where it is stored, as it is in a model that was not prepared."""
    return replace(packed, codes=to_chunks(packed.codes), layout=LAYOUT) if packed.layout == TILES else packed


def check_layout(members: Sequence[PackedLinear]) -> None:
    """The kernels read what others would lay out past its end. Raises UnsupportedError for any other layout."""
    for member in members:
        if member.layout != LAYOUT:
            raise UnsupportedError(f"codes laid out for '{member.layout}', not for '{LAYOUT}': lay the model out anew")


def to_chunks(codes: torch.Tensor) -> torch.Tensor:
    """Stored codes, int32 [row tiles, column tiles, words] -> int32 [row tiles, chunks, 16 words]."""
    rows = max(1, _BATCH_BITS // (codes.shape[1] * codes.shape[2] * WORD))
    return torch.cat([_rows_to_chunks(part) for part in codes.split(rows)])


def from_chunks(chunks: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
    """Inverse of `to_chunks`."""
    rows = max(1, _BATCH_BITS // (stored_shape[1] * stored_shape[2] * WORD))
    return torch.cat([_rows_from_chunks(part, stored_shape) for part in chunks.split(rows)])


def _rows_to_chunks(codes: torch.Tensor) -> torch.Tensor:
    rows, columns, words = codes.shape
    padding = -columns % CHUNK
    padded = torch.cat([codes, codes.new_zeros(rows, padding, words)], dim=1)
    bits = unpack_stream(padded).to(torch.uint8).reshape(rows, -1, CHUNK, LANES, words)
    streams = bits.transpose(2, 3).reshape(rows, -1, LANES, CHUNK * words)
    if words % 2:
        streams = torch.cat([streams, streams.new_zeros(*streams.shape[:-1], WORD // 2)], dim=-1)
    return _interleave(pack_stream(streams), words)


def _rows_from_chunks(chunks: torch.Tensor, stored_shape: tuple[int, int, int]) -> torch.Tensor:
    rows, (_, columns, words) = chunks.shape[0], stored_shape
    streams = unpack_stream(_separate(chunks, words))[..., : CHUNK * words].to(torch.uint8)
    bits = streams.reshape(rows, -1, LANES, CHUNK, words).transpose(2, 3)
    return pack_stream(bits.reshape(rows, -1, LANES * words))[:, :columns].contiguous()


def _parts(words: int) -> list[tuple[int, int]]:
    """(first word, number of words) that a lane loads at once."""
    full = words // 2
    parts = [(first, 4) for first in range(0, full - 3, 4)]
    if full & 2:
        parts.append((full // 4 * 4, 2))
    if full & 1:
        parts.append((full - 1, 1))
    return parts


def _interleave(lanes: torch.Tensor, words: int) -> torch.Tensor:
    """int32 [rows, chunks, 32 lanes, ceil(words / 2)] -> int32 [rows, chunks, 16 words]."""
    halves = lanes.contiguous().view(torch.int16).reshape(*lanes.shape, 2)
    parts = [halves[..., first : first + count, :].flatten(2) for first, count in _parts(words)]
    if words % 2:
        parts.append(halves[..., -1, 1])  # the high half: the first bits
    return torch.cat(parts, dim=-1).contiguous().view(torch.int32)


def _separate(chunks: torch.Tensor, words: int) -> torch.Tensor:
    """Inverse of `_interleave`; the missing half of a last word is zero."""
    halves = chunks.contiguous().view(torch.int16)
    lanes = halves.new_zeros(*chunks.shape[:2], LANES, -(-words // 2), 2)
    at = 0
    for first, count in _parts(words):
        lanes[..., first : first + count, :] = halves[..., at : at + 64 * count].reshape(
            *chunks.shape[:2], LANES, count, 2
        )
        at += 64 * count
    if words % 2:
        lanes[..., -1, 1] = halves[..., at:]
    return lanes.view(torch.int32)[..., 0]
