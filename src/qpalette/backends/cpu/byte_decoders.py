"""Codes whose weights can be multiplied as bytes, and how sixteen pairs of tiles become bytes: the counterpart of
`decoders`, for processors with AVX-512's byte permutations and dot products.

Of a trellis, a lane of 32 bits holds the last 16 bits of two streams, those of a tile and of the tile four to its
right: states of up to 16 bits, and after the look-up two bytes of each, neighbours in a row of the matrix. A dot
product of bytes sums just these four. Other codes lie in `fields`. Codebooks stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from qpalette.backends.cpu import instructions, simd
from qpalette.backends.cpu.decoders import HALVES, Arrays
from qpalette.backends.cpu.jit import inlined
from qpalette.codes import Quantizer
from qpalette.codes.description import LANE_WEIGHTS, Decoder

ACTIVATION_ERROR = 2.9e-5  # squared, of a Gaussian value rounded to one of 255 steps of the largest of 32: measured
MOST_ADDED_ERROR = 0.02  # what both roundings may add to a code's own distortion
_WINDOW = 16  # bits of a lane
_ENTRIES = 512  # bytes in eight registers
_CELLS = 128  # of neighbouring magnitudes: what one look-up tells apart
_TAIL = 64  # magnitudes, the largest, of the first sixteen cells: there neighbours differ most
_BELOW = np.int16(_WINDOW - _ENTRIES.bit_length())  # bits of a hash below its sign and an index of magnitudes


class ByteDecoder(NamedTuple):
    """A code as `byte_matmul` takes it: the name of a way in `TRELLISES` or `FIELDS`, and what it decodes.

    arrays: words int64 [64 * 2], where the two words with the 16 bits before and after the start of each half lane lie
    among those of sixteen tiles; turns int32 [64], how far right the last of these 32 bits is from becoming the lowest;
    ends int16 [8], how far right the last bit of each weight's step is from there; numbers int16 [2], how
    far left a state goes, and what is then added, before the state is multiplied by it; table, bytes.
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
    if not instructions.HAS_BYTES or decoder.memory > _WINDOW:
        return None
    if decoder.hashed and max(np.cumsum(half)[-1] for half in _halves(decoder.shifts)) > _WINDOW:
        return None
    numbers = (1 + _WINDOW - decoder.memory, 1 << (_WINDOW - decoder.memory)) if decoder.hashed else (0, 0)
    entries = quantizer.entries()
    for way, levels, step, table in _magnitudes(decoder, entries) if decoder.hashed else _levels(decoder, entries):
        added = float((levels * step - entries[: len(levels)]).double().square().mean()) + ACTIVATION_ERROR
        if added < MOST_ADDED_ERROR * quantizer.claimed_distortion:
            held = torch.zeros(_ENTRIES, dtype=torch.uint8)
            held[: table.numel()] = table.flatten().to(torch.int64).to(torch.uint8)
            arrays = Arrays(*_windows(decoder.shifts), np.array(numbers, np.int16), held.numpy().view(np.int8))
            return ByteDecoder(way, arrays, step)
    return None


_Codebook = tuple[str, torch.Tensor, float, torch.Tensor]  # way, entries in steps, step, bytes in registers


def _magnitudes(decoder: Decoder, entries: torch.Tensor) -> Iterator[_Codebook]:
    """Of a hash, whose top bit is the sign; the largest magnitudes are first. Those of a cell become their mean: the
    cells are uneven, and most of what that costs is in the few that hold the largest, which may stay as they are."""
    magnitudes = entries[: len(entries) // 2].flatten()
    if decoder.width > 1 or len(magnitudes) > _ENTRIES:
        return
    step = float(magnitudes.abs().max()) / 255
    every = _ENTRIES // len(magnitudes)
    fine = magnitudes.repeat_interleave(every) / step
    each, cells = fine.round(), fine.view(_CELLS, -1).mean(1).round()
    shared = cells.repeat_interleave(_ENTRIES // _CELLS)
    for way, levels in ("hashed", shared), ("hashed tail", torch.cat([each[:_TAIL], shared[_TAIL:]])):
        yield way, levels[::every, None], step, torch.cat([cells, each[:_TAIL]])


def _levels(decoder: Decoder, entries: torch.Tensor) -> Iterator[_Codebook]:
    """Of a code in `fields`."""
    way = next((way for way, kind in FIELDS.items() if kind == (decoder.index_bits, decoder.width)), None)
    if way is None:
        return
    step = float(entries.abs().max()) / 127
    levels = torch.round(entries / step)
    copies = _ENTRIES // levels.numel()  # the bits above an index are not masked
    yield way, levels, step, (levels + instructions.MIDDLE).T.repeat(1, copies)


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
def registers(ends, numbers, table):  # type: ignore[no-untyped-def]
    """What stays in registers: a vector for each of eight ends and of two numbers, and the table."""
    return (
        (
            simd.load_splath(ends, 0),
            simd.load_splath(ends, 1),
            simd.load_splath(ends, 2),
            simd.load_splath(ends, 3),
            simd.load_splath(ends, 4),
            simd.load_splath(ends, 5),
            simd.load_splath(ends, 6),
            simd.load_splath(ends, 7),
        ),
        (simd.load_splath(numbers, 0), simd.load_splath(numbers, 1)),
        (simd.loadb(table, 0), simd.loadb(table, 64), simd.loadb(table, 128)),
    )


@inlined
def _hash_at_top(state, numbers):  # type: ignore[no-untyped-def]
    """s (2 s + 1) << (16 - L): the L bits of the hash come to the top, what is older than L falls off."""
    return simd.mulh(state, simd.addh(simd.shlh(state, numbers[0]), numbers[1]))


@inlined
def _hashes(before, after, first, second, numbers):  # type: ignore[no-untyped-def]
    return (
        _hash_at_top(simd.shift_in_halves(before, after, first), numbers),
        _hash_at_top(simd.shift_in_halves(before, after, second), numbers),
    )


@inlined
def _hashed(before, after, first, second, numbers, table):  # type: ignore[no-untyped-def]
    hashes = _hashes(before, after, first, second, numbers)
    signs = simd.high_bytes(hashes[0], hashes[1])
    return simd.lookup128(table[0], table[1], signs), signs


@inlined
def _hashed_tail(before, after, first, second, numbers, table):  # type: ignore[no-untyped-def]
    hashes = _hashes(before, after, first, second, numbers)
    signs = simd.high_bytes(hashes[0], hashes[1])
    below = simd.splath(_BELOW)
    each = simd.lookup64(table[2], simd.low_bytes(simd.shrh(hashes[0], below), simd.shrh(hashes[1], below)))
    return simd.lookup128_but_first(table[0], table[1], signs, each), signs


# Of a trellis, each gives unsigned bytes, and bytes that have the signs of the weights, from `byte_half_lane` and the
# ends of two neighbouring weights.
TRELLISES: dict[str, Callable[..., Any]] = {"hashed": _hashed, "hashed tail": _hashed_tail}
# Width of an index, and its weights.
FIELDS = {f"fields {width}": (width, 1) for width in range(1, 7)}
FIELDS |= {f"fields of pairs {width}": (width, 2) for width in range(1, 9)}
