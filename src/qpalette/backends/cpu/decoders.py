"""How sixteen codewords become sixteen weights, one compile-time decoder per family.

A decoder is a numba function `(window, parameters) -> F`, or a pair of F for families that code two weights at a time.
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
from qpalette.codes.nuq import NonUniform
from qpalette.codes.tcq import TrellisCoded
from qpalette.codes.tcq2 import TrellisCodedPairs
from qpalette.codes.trellis import Trellis
from qpalette.codes.vq import VectorQuantized

_SIGN = np.int32(-(1 << 31))


@kernel
def _hash_at_top(state, to_top):  # type: ignore[no-untyped-def]
    """s (2 s + 1) << `to_top` = 32 - L: the L bits of the hash come to the top, what is older than L falls off."""
    factor = simd.addi(simd.shli(state, simd.splati(to_top + np.int32(1))), simd.splati(np.int32(1) << to_top))
    return simd.muli(state, factor)


@lru_cache(maxsize=64)
def trellis_decoder(memory: int, codebook_bits: int) -> Any:
    """Codebook value of a trellis state, computed: the table of slopes and intercepts stays in registers."""
    to_top, keep_index = np.int32(32 - memory), np.int32(31 - codebook_bits)
    index_mask = np.int32((1 << codebook_bits) - 1)

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
def trellis_pair_decoder(memory: int, codebook_bits: int) -> Any:
    """Both weights of a trellis state, from a codebook [first coordinates, second coordinates] in memory."""
    to_top, keep_index = np.int32(32 - memory), np.int32(31 - codebook_bits)
    entries, index_mask = np.int32(1 << codebook_bits), np.int32((1 << codebook_bits) - 1)

    @kernel
    def decode(state, parameters):  # type: ignore[no-untyped-def]
        hashed = _hash_at_top(state, to_top)
        index = simd.andi(simd.shri(hashed, simd.splati(keep_index)), simd.splati(index_mask))
        sign = simd.andi(hashed, simd.splati(_SIGN))
        first = simd.bits_of_float(simd.gatherf(parameters, index))
        second = simd.bits_of_float(simd.gatherf(parameters, simd.addi(index, simd.splati(entries))))
        return simd.float_of_bits(simd.xori(first, sign)), simd.float_of_bits(simd.xori(second, sign))

    return decode


@lru_cache(maxsize=16)
def pair_decoder(bits: int) -> Any:
    """Entry of a codebook [first coordinates, second coordinates] in memory."""
    mask, entries = np.int32((1 << bits) - 1), np.int32(1 << bits)

    @kernel
    def decode(window, parameters):  # type: ignore[no-untyped-def]
        index = simd.andi(window, simd.splati(mask))
        return simd.gatherf(parameters, index), simd.gatherf(parameters, simd.addi(index, simd.splati(entries)))

    return decode


@lru_cache(maxsize=16)
def scalar_decoder(bits: int) -> Any:
    """Entry of a codebook in memory."""
    mask = np.int32((1 << bits) - 1)

    @kernel
    def decode(window, parameters):  # type: ignore[no-untyped-def]
        return simd.gatherf(parameters, simd.andi(window, simd.splati(mask)))

    return decode


class Decoder(NamedTuple):
    """`decode` gives `width` weights per window; `pattern` has the bits that each step of eight weights takes."""

    decode: Any
    width: int
    parameters: np.ndarray
    pattern: tuple[int, ...]


@lru_cache(maxsize=256)
def decoder_of(quantizer: Quantizer) -> Decoder | None:
    """None for a family that this backend does not know."""
    if isinstance(quantizer, TrellisCoded):
        parameters = np.concatenate([part.numpy() for part in quantizer.segments()])
        return Decoder(trellis_decoder(quantizer.memory, quantizer.codebook_bits), 1, parameters, _pattern(quantizer))
    if isinstance(quantizer, TrellisCodedPairs):
        decode = trellis_pair_decoder(quantizer.memory, quantizer.codebook_bits)
        return Decoder(decode, 2, quantizer.codebook().T.flatten().numpy(), _pattern(quantizer))
    if isinstance(quantizer, VectorQuantized):
        parameters = quantizer.codebook().T.flatten().numpy()
        return Decoder(pair_decoder(quantizer.index_bits), 2, parameters, (quantizer.index_bits,) * 4)
    if isinstance(quantizer, NonUniform):
        return Decoder(scalar_decoder(quantizer.bits), 1, quantizer.codebook().numpy(), (quantizer.bits,) * 8)
    return None


def _pattern(quantizer: Trellis) -> tuple[int, ...]:
    return tuple(quantizer.shifts()[: 8 // quantizer.values_per_step].tolist())
