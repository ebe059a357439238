"""Codes whose weights can be multiplied as bytes, and how sixteen pairs of tiles become bytes: the counterpart of
`decoders`, for processors with AVX-512's byte permutations and dot products.

A lane of 32 bits holds the last 16 bits of two streams, those of a tile and of the tile four to its right: the states
of a trellis of up to 16 bits, and after the look-up two bytes of each, neighbours in a row of the matrix. A dot product
of bytes sums just these four. Codebooks stay in eight registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.decoders import HALVES, Arrays
from qpalette.backends.cpu.jit import inlined
from qpalette.codes import Quantizer
from qpalette.codes.description import LANE_WEIGHTS

ACTIVATION_ERROR = 2.9e-5  # squared, of a Gaussian value rounded to one of 255 steps of the largest of 32: measured
MOST_ADDED_ERROR = 0.02  # what both roundings may add to a code's own distortion
_WINDOW = 16  # bits of a lane
_ENTRIES = 512  # bytes in eight registers
_MIDDLE = 128  # of an unsigned byte


class ByteDecoder(NamedTuple):
    """A code as `byte_matmul` takes it: the name of a way in `WAYS`, and what it decodes.

    arrays: words int64 [64 * 2], where the two words with the 16 bits before and after the start of each half lane lie
    among those of sixteen tiles; turns int32 [64], how far right the last of these 32 bits is from becoming the lowest;
    ends int16 [8], how far right the last bit of each weight's step is from there; numbers int16 [2]; table, bytes.
    step: what 1 stands for in the table.
    """

    way: str
    arrays: Arrays
    step: float


@lru_cache(maxsize=256)
def byte_decoder_of(quantizer: Quantizer) -> ByteDecoder | None:
    """None where the processor has no such instructions, where the code does not fit them, or where rounding its
    entries and the activations would cost more than MOST_ADDED_ERROR."""
    decoder = quantizer.decoder
    assert decoder is not None, "supports() said no"
    top, index = decoder.memory, decoder.index_bits
    way = {(True, 1): "hashed", (False, 1): "plain", (False, 2): "plain pair"}.get((decoder.hashed, decoder.width))
    if not simd.HAS_BYTES or way is None or index > _MOST_INDEX_BITS[way] or top > _WINDOW:
        return None
    if max(np.cumsum(half)[-1] for half in _halves(decoder.shifts)) > _WINDOW:
        return None
    entries = quantizer.entries()
    if way == "hashed":  # magnitudes; the top bit of the index is the sign
        entries = entries[: len(entries) // 2]
    step = float(entries.abs().max()) / (255 if way == "hashed" else 127)
    rounded = torch.round(entries / step)
    added = float((rounded * step - entries).double().square().mean()) + ACTIVATION_ERROR
    if added > MOST_ADDED_ERROR * quantizer.claimed_distortion:
        return None
    table = rounded if way == "hashed" else rounded + _MIDDLE
    copies = _ENTRIES // table.numel()  # the bits above an index are not masked
    laid = table.repeat_interleave(copies, 0) if way == "hashed" else table.T.repeat(1, copies)
    numbers = (1 + _WINDOW - top, 1 << (_WINDOW - top)) if decoder.hashed else (0, 0)
    arrays = Arrays(
        *_windows(decoder.shifts),
        np.array(numbers, np.int16),
        laid.flatten().to(torch.uint8).numpy().view(np.int8),
    )
    return ByteDecoder(way, arrays, step)


def _halves(shifts: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shifts[: len(shifts) // 2], shifts[len(shifts) // 2 :]


def _windows(shifts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`words`, `turns` and `ends` for the bits that enter at each step of eight weights."""
    bits, halves = sum(shifts), _halves(shifts)
    starts = np.array([0, sum(halves[0])])
    last = (bits * np.arange(HALVES // 2)[:, None] + starts).reshape(-1) + _WINDOW - 1
    words = (last[:, None] // 32 + np.arange(-1, 1)) % bits * simd.LANES  # the stream is a circle
    ends = _WINDOW - np.concatenate([np.cumsum(half) for half in halves]).repeat(LANE_WEIGHTS // len(shifts))
    return words.reshape(-1).astype(np.int64), (31 - last % 32).astype(np.int32), ends.astype(np.int16)


@inlined
def byte_half_lane(codes, left, right, half, words, turns):  # type: ignore[no-untyped-def]
    """The 16 stream bits before a half lane, and the 16 from there on, of the tiles that start at codes[left] and at
    codes[right]."""
    older, newer, turn = words[2 * half], words[2 * half + 1], simd.load_splati(turns, half)
    first = simd.funnel_shift_right(simd.loadi(codes, left + older), simd.loadi(codes, left + newer), turn)
    second = simd.funnel_shift_right(simd.loadi(codes, right + older), simd.loadi(codes, right + newer), turn)
    return simd.high_halves(first, second), simd.low_halves(first, second)


@inlined
def registers(ends, table):  # type: ignore[no-untyped-def]
    """What stays in registers: a vector for each of eight ends, and the table."""
    return (
        simd.load_splath(ends, 0),
        simd.load_splath(ends, 1),
        simd.load_splath(ends, 2),
        simd.load_splath(ends, 3),
        simd.load_splath(ends, 4),
        simd.load_splath(ends, 5),
        simd.load_splath(ends, 6),
        simd.load_splath(ends, 7),
    ), (
        simd.loadb(table, 0),
        simd.loadb(table, 64),
        simd.loadb(table, 128),
        simd.loadb(table, 192),
        simd.loadb(table, 256),
        simd.loadb(table, 320),
        simd.loadb(table, 384),
        simd.loadb(table, 448),
    )


@inlined
def _lookup512(table, index, ninth):  # type: ignore[no-untyped-def]
    """`index` says which of 256 entries, and the sign of `ninth` in which half of the table."""
    low = simd.where_negative(
        index, simd.lookup128(table[2], table[3], index), simd.lookup128(table[0], table[1], index)
    )
    high = simd.where_negative(
        index, simd.lookup128(table[6], table[7], index), simd.lookup128(table[4], table[5], index)
    )
    return simd.where_negative(ninth, high, low)


@inlined
def _hash_at_top(state, shift, one):  # type: ignore[no-untyped-def]
    """s (2 s + 1) << (16 - L): the L bits of the hash come to the top, what is older than L falls off."""
    return simd.mulh(state, simd.addh(simd.shlh(state, shift), one))


@inlined
def _hashed(before, after, first, second, numbers, table):  # type: ignore[no-untyped-def]
    """The ten top bits of a hash are a sign and an index."""
    shift, one, six = simd.splath(numbers[0]), simd.splath(numbers[1]), simd.splath(np.int16(6))
    h0 = _hash_at_top(simd.shift_in_halves(before, after, first), shift, one)
    h1 = _hash_at_top(simd.shift_in_halves(before, after, second), shift, one)
    signs = simd.high_bytes(h0, h1)
    index = simd.low_bytes(simd.shrh(h0, six), simd.shrh(h1, six))
    return _lookup512(table, index, simd.addb(signs, signs)), signs


@inlined
def _plain(before, after, first, second, numbers, table):  # type: ignore[no-untyped-def]
    w0, w1 = simd.shift_in_halves(before, after, first), simd.shift_in_halves(before, after, second)
    return simd.lookup64(table[0], simd.low_bytes(w0, w1)), simd.splatb(np.int8(0))


@inlined
def _plain_pair(before, after, first, second, numbers, table):  # type: ignore[no-untyped-def]
    """`table` has first weights, then second ones."""
    window = simd.shift_in_halves(before, after, first)
    odd = simd.bytes_of_halves(simd.splath(np.int16(-(1 << 8))))
    return _lookup512(table, simd.low_bytes(window, window), odd), simd.splatb(np.int8(0))


class ByteWay(NamedTuple):
    """decode: unsigned bytes, and bytes that have the signs of the weights, from `byte_half_lane` and the ends of two
    neighbouring weights. middle: the byte that stands for 0."""

    decode: Callable[..., Any]
    middle: int


WAYS = {
    "hashed": ByteWay(_hashed, 0),
    "plain": ByteWay(_plain, _MIDDLE),
    "plain pair": ByteWay(_plain_pair, _MIDDLE),
}
_MOST_INDEX_BITS = {"hashed": 10, "plain": 6, "plain pair": 8}
