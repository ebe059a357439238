"""How the code words of sixteen tiles become weights: one compiled way for each kind of decoder, whatever its rate.

Rates, memories and tables reach the kernels as arrays (`Arrays`), so that a model of many rates compiles few kernels;
so does where the bits lie, which leaves a few loads per half lane to the kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.fields import in_fields, place_of, planes_of
from qpalette.backends.cpu.jit import inlined
from qpalette.codes import Quantizer

HALVES = 64  # of a tile: four weights, 4 to 32 bits; two are a scan-order lane (`codes.description`)
_MOST_PLANES = 3
_SIGN = np.int32(-(1 << 31))


class Arrays(NamedTuple):
    """A code as the kernels take it.

    words: int64 [64 * 3], where three neighbouring words start among those of sixteen tiles, for each half lane: the
    last bit before it is in the second one. turns: int32 [64], how far right this bit is from becoming the lowest.
    ends: int32 [steps of a lane], how far right the last bit of a step is from there, in the 32 bits from its half on.
    numbers: int32, and table: float32, as the way of decoding wants them.
    """

    words: np.ndarray
    turns: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray
    table: np.ndarray


class CompiledDecoder(NamedTuple):
    """The name of a way in `WAYS`, and what it decodes."""

    way: str
    arrays: Arrays


@lru_cache(maxsize=256)
def decoder_of(quantizer: Quantizer) -> CompiledDecoder:
    """For a code that says how it is decoded."""
    decoder, segments = quantizer.decoder, quantizer.segments()
    assert decoder is not None, "supports() said no"
    top, index = decoder.memory, decoder.index_bits
    numbers: tuple[int, ...]
    if decoder.hashed and segments is not None:
        numbers = (33 - top, 1 << (32 - top), 31 - index, (1 << index) - 1)
        way, table = "computed", np.concatenate([part.numpy() for part in segments])
    elif decoder.hashed:
        numbers = (33 - top, 1 << (32 - top), 32 - index, 1 << index)
        way, table = ("hashed", "hashed pair")[decoder.width - 1], quantizer.entries().T.flatten().numpy()
    elif in_fields(quantizer):
        planes = [*planes_of(index), *[(0, 0, 0)] * _MOST_PLANES][:_MOST_PLANES]
        numbers = (index, 1 << index, *(number for plane in planes for number in plane))
        way, table = ("fields", "fields pair")[decoder.width - 1], quantizer.entries().T.flatten().numpy()
    else:
        numbers = ((1 << index) - 1, 1 << index)
        way, table = ("plain", "plain pair")[decoder.width - 1], quantizer.entries().T.flatten().numpy()
    return CompiledDecoder(way, Arrays(*_windows(decoder.shifts), np.array(numbers, np.int32), table))


def _windows(shifts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`words`, `turns` and `ends` of Arrays for the bits that enter at each step of eight weights."""
    half, bits = len(shifts) // 2, sum(shifts)  # of a lane; a tile has as many words
    starts = np.array([0, sum(shifts[:half])])
    last = (bits * np.arange(HALVES // 2)[:, None] + starts).reshape(-1) - 1
    words = (last[:, None] // 32 + np.arange(-1, 2)) % bits * simd.LANES  # the stream is a circle
    ends = 32 - np.concatenate([np.cumsum(shifts[:half]), np.cumsum(shifts[half:])])
    return words.reshape(-1).astype(np.int64), (31 - last % 32).astype(np.int32), ends.astype(np.int32)


@inlined
def half_lane(codes, base, half, words, turns):  # type: ignore[no-untyped-def]
    """The 32 stream bits of each tile before a half lane, and the 32 from there on; the tiles start at codes[base]."""
    w0 = simd.loadi(codes, base + words[3 * half])
    w1 = simd.loadi(codes, base + words[3 * half + 1])
    w2 = simd.loadi(codes, base + words[3 * half + 2])
    turn = simd.load_splati(turns, half)
    return simd.funnel_shift_right(w0, w1, turn), simd.funnel_shift_right(w1, w2, turn)


@inlined
def _window(before, after, step, ends):  # type: ignore[no-untyped-def]
    """The stream bits that end with those of `step`, the newest lowest; older ones than a decoder's are not masked."""
    return simd.funnel_shift_right(before, after, simd.load_splati(ends, step))


@inlined
def _hash_at_top(state, numbers):  # type: ignore[no-untyped-def]
    """s (2 s + 1) << (32 - L): the L bits of the hash come to the top, what is older than L falls off."""
    doubled = simd.shli(state, simd.load_splati(numbers, 0))
    return simd.muli(state, simd.addi(doubled, simd.load_splati(numbers, 1)))


@inlined
def _computed(state, numbers, table):  # type: ignore[no-untyped-def]
    """The codebook's value from 32 slopes and intercepts, which stay in registers."""
    hashed = _hash_at_top(state, numbers)
    index = simd.andi(simd.shri(hashed, simd.load_splati(numbers, 2)), simd.load_splati(numbers, 3))
    odd = simd.to_float(simd.ori(index, simd.splati(np.int32(1))))
    segment = simd.shri(simd.bits_of_float(odd), simd.splati(np.int32(22)))
    slope = simd.lookup32(simd.loadf(table, 0), simd.loadf(table, 16), segment)
    intercept = simd.lookup32(simd.loadf(table, 32), simd.loadf(table, 48), segment)
    magnitude = simd.bits_of_float(simd.fmaf(slope, odd, intercept))
    return simd.float_of_bits(simd.xori(magnitude, simd.andi(hashed, simd.splati(_SIGN))))


@inlined
def _hashed(state, numbers, table):  # type: ignore[no-untyped-def]
    return simd.gatherf(table, simd.shri(_hash_at_top(state, numbers), simd.load_splati(numbers, 2)))


@inlined
def _hashed_pair(state, numbers, table):  # type: ignore[no-untyped-def]
    """`table` has first weights, then second ones."""
    index = simd.shri(_hash_at_top(state, numbers), simd.load_splati(numbers, 2))
    return simd.gatherf(table, index), simd.gatherf(table, simd.addi(index, simd.load_splati(numbers, 3)))


@inlined
def _plain(window, numbers, table):  # type: ignore[no-untyped-def]
    return simd.gatherf(table, simd.andi(window, simd.load_splati(numbers, 0)))


@inlined
def _plain_pair(window, numbers, table):  # type: ignore[no-untyped-def]
    """`table` has first weights, then second ones."""
    index = simd.andi(window, simd.load_splati(numbers, 0))
    return simd.gatherf(table, index), simd.gatherf(table, simd.addi(index, simd.load_splati(numbers, 1)))


def _lane_of_stream(two_weights: Any) -> Any:
    @inlined
    def lane_weights(codes, base, lane, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        before, after = half_lane(codes, base, 2 * lane, words, turns)
        w0, w1 = two_weights(before, after, 0, ends, numbers, table)
        w2, w3 = two_weights(before, after, 1, ends, numbers, table)
        before, after = half_lane(codes, base, 2 * lane + 1, words, turns)
        w4, w5 = two_weights(before, after, 2, ends, numbers, table)
        w6, w7 = two_weights(before, after, 3, ends, numbers, table)
        return w0, w1, w2, w3, w4, w5, w6, w7

    return lane_weights


def _two_of_singles(decode: Any) -> Any:
    @inlined
    def two_weights(before, after, pair, ends, numbers, table):  # type: ignore[no-untyped-def]
        first = decode(_window(before, after, 2 * pair, ends), numbers, table)
        return first, decode(_window(before, after, 2 * pair + 1, ends), numbers, table)

    return _lane_of_stream(two_weights)


def _two_of_pairs(decode: Any) -> Any:
    @inlined
    def two_weights(before, after, pair, ends, numbers, table):  # type: ignore[no-untyped-def]
        return decode(_window(before, after, pair, ends), numbers, table)

    return _lane_of_stream(two_weights)


def _lane_of_fields(weights: int) -> Any:
    place = inlined(place_of)

    @inlined
    def index_at(codes, base, row, column, numbers):  # type: ignore[no-untyped-def]
        unit, vector, byte = place(row, column, weights)
        index = simd.splati(np.int32(0))
        for plane in range(_MOST_PLANES):
            bits, word, target = numbers[2 + 3 * plane], numbers[3 + 3 * plane], numbers[4 + 3 * plane]
            at = base + (unit * numbers[0] + word + vector * bits // 8) * simd.LANES
            field = simd.shri(simd.loadi(codes, at), simd.splati(np.int32(8 * byte + vector * bits % 8)))
            field = simd.andi(field, simd.splati(np.int32((1 << bits) - 1)))
            index = simd.ori(index, simd.shli(field, simd.splati(target)))
        return index

    @inlined
    def two_weights(codes, base, row, column, numbers, table):  # type: ignore[no-untyped-def]
        index = index_at(codes, base, row, column, numbers)
        if weights == 2:
            return simd.gatherf(table, index), simd.gatherf(table, simd.addi(index, simd.splati(numbers[1])))
        return simd.gatherf(table, index), simd.gatherf(table, index_at(codes, base, row, column + 1, numbers))

    @inlined
    def lane_weights(codes, base, lane, words, turns, ends, numbers, table):  # type: ignore[no-untyped-def]
        row, column = lane // 4, 2 * (lane % 4)
        w0, w1 = two_weights(codes, base, row, column, numbers, table)
        w2, w3 = two_weights(codes, base, row + 8, column, numbers, table)
        w4, w5 = two_weights(codes, base, row, column + 8, numbers, table)
        w6, w7 = two_weights(codes, base, row + 8, column + 8, numbers, table)
        return w0, w1, w2, w3, w4, w5, w6, w7

    return lane_weights


# Each gives the eight weights of a scan-order lane: rows r and r + 8, columns c, c + 1, c + 8, c + 9 (codes.tiles).
WAYS = {
    "computed": _two_of_singles(_computed),
    "hashed": _two_of_singles(_hashed),
    "hashed pair": _two_of_pairs(_hashed_pair),
    "plain": _two_of_singles(_plain),
    "plain pair": _two_of_pairs(_plain_pair),
    "fields": _lane_of_fields(1),
    "fields pair": _lane_of_fields(2),
}
