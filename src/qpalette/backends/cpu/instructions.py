"""What the processor has, and look-ups and dot products in it: no portable vector operation stands for them.

Vectors are of 512 bits everywhere. AVX-512 has an instruction for each of these, AVX2 several (`avx2`); results are the
same.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba.core.registry import cpu_target

from qpalette.backends.cpu import avx2
from qpalette.backends.cpu.avx2 import call

BYTE_FEATURES = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512vbmi2", "avx512vnni"}


def features() -> set[str]:
    """What numba compiles for: of this processor, unless NUMBA_CPU_FEATURES says otherwise."""
    listed = str(cpu_target.target_context.codegen().magic_tuple()[2]).split(",")
    return {feature[1:] for feature in listed if feature.startswith("+")}


def has_wide_bytes(present: set[str]) -> bool:
    """Whether one instruction looks up 64 or 128 bytes, and one sums the products of 64."""
    return present >= BYTE_FEATURES


def has_vnni(present: set[str]) -> bool:
    """Whether one instruction sums the products of bytes, at least 32 of them."""
    return "avxvnni" in present or present >= {"avx512vnni", "avx512vl"}


HAS_AVX512 = "avx512f" in features()
HAS_AVX2 = "avx2" in features()
HAS_BYTES = HAS_AVX2 or has_wide_bytes(features())
MIDDLE = 128 if has_vnni(features()) else 0  # what is added to levels, bytes of -127 to 127, before they are multiplied
_WIDE = has_wide_bytes(features())
IN_SHORTS = HAS_AVX2 and not MIDDLE  # whether bytes are multiplied by several tokens as int16: half the instructions


def look_up_floats(builder: Any, low: Any, high: Any, index: Any) -> Any:
    """index mod 32 of a table of float32; None where there is no such instruction."""
    if HAS_AVX512:
        return call(builder, "x86.avx512.vpermi2var.ps.512", low.type, low, index, high)
    return avx2.look_up_floats(builder, [low, high], index) if HAS_AVX2 else None


def lookup16(builder: Any, table: Any, index: Any) -> Any:
    return lookup64(builder, table, index) if _WIDE else avx2.look_up_bytes(builder, [table], 16, index)


def lookup64(builder: Any, table: Any, index: Any) -> Any:
    if _WIDE:
        return call(builder, "x86.avx512.permvar.qi.512", table.type, table, index)
    return avx2.look_up_bytes(builder, [table], 64, index)


def lookup128(builder: Any, low: Any, high: Any, index: Any) -> Any:
    if _WIDE:
        return call(builder, "x86.avx512.vpermi2var.qi.512", low.type, low, index, high)
    return avx2.look_up_bytes(builder, [low, high], 128, index)


def lookup128_but_first(builder: Any, low: Any, high: Any, index: Any, first: Any) -> Any:
    if not _WIDE:
        return avx2.look_up_bytes(builder, [low, high], 128, index, first)
    above = builder.and_(index, ir.Constant(index.type, [112] * index.type.count))
    is_first = builder.icmp_unsigned("==", above, ir.Constant(index.type, [0] * index.type.count))
    return builder.select(is_first, first, lookup128(builder, low, high, index))


def dot_magnitudes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    if _WIDE:
        words = [builder.bitcast(each, total.type) for each in (unsigned, signed)]
        return call(builder, "x86.avx512.vpdpbusd.512", total.type, total, *words)
    return (avx2.dot_vnni if MIDDLE else avx2.dot_unsigned)(builder, total, unsigned, signed)


def dot_levels(builder: Any, total: Any, levels: Any, signed: Any) -> Any:
    return (dot_magnitudes if MIDDLE else avx2.dot_signed)(builder, total, levels, signed)
