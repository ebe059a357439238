"""How sixteen codewords become sixteen weights, one compile-time decoder for each way to do it.

A decoder is a numba function `(window, parameters) -> F`, or a pair of F for codes that take two weights at a time.
`window` holds the stream bits that end with the code's last bit, the newest lowest, with older bits above (never masked
off: each decoder ignores them).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import kernel
from qpalette.codes import Quantizer

_SIGN = np.int32(-(1 << 31))


@kernel
def _hash_at_top(state, to_top):  # type: ignore[no-untyped-def]
    """s (2 s + 1) << `to_top` = 32 - L: the L bits of the hash come to the top, what is older than L falls off."""
    factor = simd.addi(simd.shli(state, simd.splati(to_top + np.int32(1))), simd.splati(np.int32(1) << to_top))
    return simd.muli(state, factor)


@lru_cache(maxsize=64)
def computed_decoder(memory: int, index_bits: int) -> Any:
    """Codebook value of a trellis state, computed: the table of slopes and intercepts stays in registers."""
    to_top, keep_index = np.int32(32 - memory), np.int32(31 - index_bits)
    index_mask = np.int32((1 << index_bits) - 1)

    @kernel
    def decode(state, parameters):  # type: ignore[no-untyped-def]
        hashed = _hash_at_top(state, to_top)
        index = simd.andi(simd.shri(hashed, simd.splati(keep_index)), simd.splati(index_mask))
        odd = simd.to_float(simd.ori(index, simd.splati(np.int32(1))))
        segment = simd.shri(simd.bits_of_float(odd), simd.splati(np.int32(22)))
        slope = simd.lookup32(simd.loadf(parameters, 0), simd.loadf(parameters, 16), segment)
        intercept = simd.lookup32(simd.loadf(parameters, 32), simd.loadf(parameters, 48), segment)
        magnitude = simd.bits_of_float(simd.fmaf(slope, odd, intercept))
        return simd.float_of_bits(simd.xori(magnitude, simd.andi(hashed, simd.splati(_SIGN))))

    return decode


@lru_cache(maxsize=64)
def hashed_pair_decoder(memory: int, index_bits: int) -> Any:
    """Both weights of a trellis state, from a table [first weights, second weights] in memory."""
    to_top, drop = np.int32(32 - memory), np.int32(32 - index_bits)
    entries = np.int32(1 << index_bits)

    @kernel
    def decode(state, parameters):  # type: ignore[no-untyped-def]
        index = simd.shri(_hash_at_top(state, to_top), simd.splati(drop))
        return simd.gatherf(parameters, index), simd.gatherf(parameters, simd.addi(index, simd.splati(entries)))

    return decode


@lru_cache(maxsize=64)
def hashed_decoder(memory: int, index_bits: int) -> Any:
    """The weight of a trellis state, from a table in memory."""
    to_top, drop = np.int32(32 - memory), np.int32(32 - index_bits)

    @kernel
    def decode(state, parameters):  # type: ignore[no-untyped-def]
        return simd.gatherf(parameters, simd.shri(_hash_at_top(state, to_top), simd.splati(drop)))

    return decode


@lru_cache(maxsize=16)
def pair_decoder(bits: int) -> Any:
    """Entry of a table [first weights, second weights] in memory."""
    mask, entries = np.int32((1 << bits) - 1), np.int32(1 << bits)

    @kernel
    def decode(window, parameters):  # type: ignore[no-untyped-def]
        index = simd.andi(window, simd.splati(mask))
        return simd.gatherf(parameters, index), simd.gatherf(parameters, simd.addi(index, simd.splati(entries)))

    return decode


@lru_cache(maxsize=16)
def scalar_decoder(bits: int) -> Any:
    """Entry of a table in memory."""
    mask = np.int32((1 << bits) - 1)

    @kernel
    def decode(window, parameters):  # type: ignore[no-untyped-def]
        return simd.gatherf(parameters, simd.andi(window, simd.splati(mask)))

    return decode


class CompiledDecoder(NamedTuple):
    """`decode` gives the weights of a window; `pattern` has the bits that each step of eight weights takes."""

    decode: Any
    parameters: np.ndarray
    pattern: tuple[int, ...]


@lru_cache(maxsize=256)
def decoder_of(quantizer: Quantizer) -> CompiledDecoder | None:
    """None for a code that does not say how it is decoded."""
    decoder = quantizer.decoder
    if decoder is None:
        return None
    segments = quantizer.segments()
    if decoder.hashed and segments is not None:
        parameters = np.concatenate([part.numpy() for part in segments])
        return CompiledDecoder(computed_decoder(decoder.memory, decoder.index_bits), parameters, decoder.shifts)
    table = quantizer.entries().T.flatten().numpy()
    if decoder.hashed:
        make = hashed_pair_decoder if decoder.width == 2 else hashed_decoder
        return CompiledDecoder(make(decoder.memory, decoder.index_bits), table, decoder.shifts)
    plain = pair_decoder if decoder.width == 2 else scalar_decoder
    return CompiledDecoder(plain(decoder.index_bits), table, decoder.shifts)
