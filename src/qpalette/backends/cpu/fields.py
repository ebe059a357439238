"""How codes whose index is a field of bits of its own, no trellis', lie in lanes: in the order in which bytes multiply.

A vector holds the word of sixteen tiles. Four indices of a tile, in one row, are to be the four bytes of its lane, for
a look-up in registers and a dot product of bytes. So each tile's bits are permuted, in units of eight such vectors,
which are a whole number of words at every width: a plane of 8, 4, 2 or 1 bits of each index at a time, those of the
vectors side by side in a byte. A vector of indices is then a shift of a word for each plane, whose strange bits above
an index tables repeat away.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba import prange

from qpalette.backends.cpu import instructions, simd
from qpalette.backends.cpu.jit import entry
from qpalette.backends.cpu.threads import parallel_caller
from qpalette.codes import Quantizer, parse_spec
from qpalette.codes.tiles import scan_order

UNIT = 8  # vectors
WIDEST = 8  # bits of an index
_PLANES = (8, 4, 2, 1)


class Plane(NamedTuple):
    """`bits` of each index, from `target` on, in the words of a unit from `word` on; vector v has its own
    v * bits % 8 bits from the start of each byte, in word v * bits // 8."""

    bits: int
    word: int
    target: int


def in_fields(quantizer: Quantizer) -> bool:
    """Whether a code is laid out so: where the processor multiplies bytes, what can be looked up."""
    decoder = quantizer.decoder
    return instructions.HAS_BYTES and decoder is not None and not decoder.hashed and decoder.index_bits <= WIDEST


def planes_of(width: int) -> list[Plane]:
    """Of an index of `width` bits."""
    planes, at = [], 0
    for bits in _PLANES:
        if width & bits:
            planes.append(Plane(bits, at, at))
            at += bits
    return planes


def place_of(row: int, column: int, weights: int) -> tuple[int, int, int]:
    """Unit, vector and byte of the index that has the weight at (row, column) of a tile: rows r, r + 8 of single
    weights are a unit, and rows r, r + 8, r + 1, r + 9 of pairs."""
    byte = column // weights % 4
    across = column // (4 * weights)
    lower = row // 8
    if weights == 1:
        return row % 8, 4 * lower + across, byte
    return row % 8 // 2, 4 * (row % 2) + 2 * lower + across, byte


def to_fields(lanes: torch.Tensor, spec: str) -> torch.Tensor:
    """Codes in lanes, their streams in order, int32 [., ., n, 16] -> the same in fields."""
    return _permuted(lanes, spec, False)


def from_fields(lanes: torch.Tensor, spec: str) -> torch.Tensor:
    """Inverse of `to_fields`."""
    return _permuted(lanes, spec, True)


def _permuted(lanes: torch.Tensor, spec: str, back: bool) -> torch.Tensor:
    decoder = parse_spec(spec).decoder
    assert decoder is not None
    blocks = lanes.contiguous().flatten(0, 1)
    out = torch.zeros_like(blocks)
    with parallel_caller():
        source, target = (each.numpy().view(np.uint32) for each in (blocks, out))
        _permute(source, target, decoder.index_bits, _places(decoder.index_bits, decoder.width), back)
    return out.view_as(lanes)


@lru_cache(maxsize=16)
def _places(width: int, weights: int) -> np.ndarray:
    """int64 [steps of a tile, planes, 4]: word, shift, target and mask of a plane of the index of each step."""
    rows, columns = (each[::weights].tolist() for each in scan_order())
    places = []
    for row, column in zip(rows, columns, strict=True):
        unit, vector, byte = place_of(row, column, weights)
        places.append(
            [
                (
                    unit * width + plane.word + vector * plane.bits // 8,
                    8 * byte + vector * plane.bits % 8,
                    plane.target,
                    (1 << plane.bits) - 1,
                )
                for plane in planes_of(width)
            ]
        )
    return np.array(places, np.int64)


@entry("fields", parallel=True)
def _permute(blocks, out, width, places, back):  # type: ignore[no-untyped-def]
    """Of `blocks` uint32 [., n, 16] into `out`, which is zero."""
    for block in prange(len(blocks)):
        source, target = blocks[block], out[block]
        for step in range(len(places)):
            last = (step + 1) * width - 1  # of the index, in a stream whose first bit is a word's highest
            newer, turn = last // 32, np.uint64(31 - last % 32)
            older = max(newer - 1, 0)
            for lane in range(simd.LANES):
                stream = np.uint64(source[older, lane]) << np.uint64(32) | np.uint64(source[newer, lane])
                index = np.uint64(0)
                for plane in range(places.shape[1]):
                    word, shift, bit, mask = places[step, plane]
                    if back:
                        field = np.uint64(source[word, lane] >> np.uint32(shift)) & np.uint64(mask)
                        index |= field << np.uint64(bit)
                    else:
                        field = stream >> turn >> np.uint64(bit) & np.uint64(mask)
                        target[word, lane] |= np.uint32(field << np.uint64(shift))
                if back:
                    target[newer, lane] |= np.uint32(index << turn & np.uint64(0xFFFFFFFF))
                    target[older, lane] |= np.uint32(index << turn >> np.uint64(32))
