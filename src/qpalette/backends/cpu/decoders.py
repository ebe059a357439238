"""How sixteen codewords become sixteen weights, one compile-time decoder per family.

A decoder is a numba function `(window, parameters) -> F`: `window` holds the stream bits that end with the weight's
last bit, the newest lowest, with older bits above (never masked off: each decoder ignores them).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import kernel
from qpalette.quantizers import Quantizer
from qpalette.quantizers.nuq import NonUniform
from qpalette.quantizers.tcq import TrellisCoded

_SIGN = np.int32(-(1 << 31))


@lru_cache(maxsize=64)
def trellis_decoder(memory: int, codebook_bits: int) -> Any:
    """Codebook value of a trellis state, computed: the table of slopes and intercepts stays in registers."""
    drop_sign, keep_index = np.int32(33 - memory), np.int32(32 - codebook_bits)
    to_sign = np.int32(32 - memory)

    @kernel
    def decode(state, parameters):  # type: ignore[no-untyped-def]
        hashed = simd.muli(state, simd.ori(simd.shli(state, simd.splati(np.int32(1))), simd.splati(np.int32(1))))
        index = simd.shri(simd.shli(hashed, simd.splati(drop_sign)), simd.splati(keep_index))
        odd = simd.to_float(simd.ori(index, simd.splati(np.int32(1))))
        segment = simd.shri(simd.bits_of_float(odd), simd.splati(np.int32(22)))
        slope = simd.lookup32(simd.loadf(parameters, 0), simd.loadf(parameters, 16), segment)
        intercept = simd.lookup32(simd.loadf(parameters, 32), simd.loadf(parameters, 48), segment)
        magnitude = simd.bits_of_float(simd.fmaf(slope, odd, intercept))
        sign = simd.andi(simd.shli(hashed, simd.splati(to_sign)), simd.splati(_SIGN))
        return simd.float_of_bits(simd.xori(magnitude, sign))

    return decode


@lru_cache(maxsize=16)
def scalar_decoder(bits: int) -> Any:
    """Entry of a codebook in memory."""
    mask = np.int32((1 << bits) - 1)

    @kernel
    def decode(window, parameters):  # type: ignore[no-untyped-def]
        return simd.gatherf(parameters, simd.andi(window, simd.splati(mask)))

    return decode


@lru_cache(maxsize=256)
def decoder_of(quantizer: Quantizer) -> tuple[Any, np.ndarray] | None:
    """(decoder, its float32 parameters), or None for a family that this backend does not know."""
    if isinstance(quantizer, TrellisCoded):
        parameters = np.concatenate([part.numpy() for part in quantizer.segments()])
        return trellis_decoder(quantizer.memory, quantizer.codebook_bits), parameters
    if isinstance(quantizer, NonUniform):
        return scalar_decoder(quantizer.bits), quantizer.codebook().numpy()
    return None


def bits_per_step(quantizer: Quantizer) -> np.ndarray:
    """Bits consumed by each of the eight steps that a lane of the scan order owns, int64 [8]."""
    if isinstance(quantizer, TrellisCoded):
        return quantizer.shifts()[:8].numpy()
    return np.full(8, int(quantizer.rate), np.int64)
