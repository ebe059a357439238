"""What AVX2 has in the place of AVX-512's instructions on bytes and tables: the same results, in 256-bit halves.

Look-ups of sixteen bytes (vpshufb) or eight floats (vpermps) are joined by the bits of an index above those. Products
of bytes are summed in pairs as 16 bits, saturated (vpmaddubsw): what is multiplied here stays below that. AVX-VNNI,
where a processor has it, sums four in 32 bits at once (vpdpbusd).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils

_INT = ir.IntType(32)
_BYTES, _WORDS, _INTS = (ir.VectorType(ir.IntType(bits), 256 // bits) for bits in (8, 16, 32))
_FLOATS = ir.VectorType(ir.FloatType(), 8)


def call(builder: Any, name: str, result: ir.Type, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), args)


def _constant(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _shuffled(builder: Any, first: Any, second: Any, places: Sequence[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT, len(places)), list(places)))


def _in_halves(builder: Any, emit: Callable[..., Any], *vectors: Any) -> Any:
    """`emit` of the lower halves of 512-bit vectors, and of the upper ones."""
    results = []
    for half in range(2):
        parts = []
        for vector in vectors:
            count = vector.type.count // 2
            parts.append(_shuffled(builder, vector, vector, range(half * count, (half + 1) * count)))
        results.append(emit(builder, *parts))
    lower, upper = results
    return _shuffled(builder, lower, upper, range(2 * lower.type.count))


def _chosen(builder: Any, found: Sequence[Any], index: Any, bit: int) -> Any:
    """Of what tables in a row have at an index, that of the table which its bits from `bit` on say. A choice reads the
    highest bit of a lane; where lanes are bytes, 16 bits are shifted at a time, as no instruction shifts bytes."""
    lanes = index.type
    shifted_in = _WORDS if lanes == _BYTES else lanes
    while len(found) > 1:
        moved = builder.shl(builder.bitcast(index, shifted_in), _constant(shifted_in, lanes.element.width - 1 - bit))
        high = builder.icmp_signed("<", builder.bitcast(moved, lanes), _constant(lanes, 0))
        found = [builder.select(high, odd, even) for even, odd in zip(found[::2], found[1::2], strict=True)]
        bit += 1
    return found[0]


def look_up_bytes(builder: Any, tables: Sequence[Any], count: int, index: Any, first: Any = None) -> Any:
    """Of the first `count` bytes of 512-bit `tables`, a power of two of at least 16, those at `index` mod `count`; with
    `first`, its bytes in the place of the first sixteen entries."""
    parts = []
    for start in range(0, count, 16):
        table = tables[start // 64]
        parts.append(_shuffled(builder, table, table, [start % 64 + place % 16 for place in range(32)]))

    def emit(builder: Any, index: Any, *first: Any) -> Any:
        low = builder.and_(index, _constant(_BYTES, 15))
        found = [call(builder, "x86.avx2.pshuf.b", _BYTES, part, low) for part in parts[len(first) :]]
        return _chosen(builder, [*first, *found], index, 4)

    return _in_halves(builder, emit, index, *([] if first is None else [first]))


def look_up_floats(builder: Any, tables: Sequence[Any], index: Any) -> Any:
    """Of the float32 lanes of 512-bit `tables`, a power of two, those at `index` mod their number."""
    parts = [_shuffled(builder, table, table, range(start, start + 8)) for table in tables for start in (0, 8)]

    def emit(builder: Any, index: Any) -> Any:
        found = [call(builder, "x86.avx2.permps", _FLOATS, part, index) for part in parts]
        return _chosen(builder, found, index, 3)

    return _in_halves(builder, emit, index)


def _pairs(builder: Any, unsigned: Any, signed: Any) -> Any:
    """Sums of two products, int16, as int32 sums of four."""
    pairs = call(builder, "x86.avx2.pmadd.ub.sw", _WORDS, unsigned, signed)
    return call(builder, "x86.avx2.pmadd.wd", _INTS, pairs, _constant(_WORDS, 1))


def dot_signed(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Each int32 lane's total plus its four products of bytes of -127 to 127: |a| (b sign a), pairs of which are at
    most 32258."""

    def emit(builder: Any, total: Any, left: Any, right: Any) -> Any:
        magnitude = call(builder, "abs.v32i8", _BYTES, left, ir.Constant(ir.IntType(1), 0))
        signed = call(builder, "x86.avx2.psign.b", _BYTES, right, left)
        return builder.add(total, _pairs(builder, magnitude, signed))

    return _in_halves(builder, emit, total, left, right)


def dot_unsigned(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Each int32 lane's total plus its four products. Bytes at even places apart from those at odd ones: a pair of
    products may be above 32767, one is at most 32640."""

    def emit(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
        for mask in (0x00FF, 0xFF00):
            words = builder.and_(builder.bitcast(unsigned, _WORDS), _constant(_WORDS, mask))
            total = builder.add(total, _pairs(builder, builder.bitcast(words, _BYTES), signed))
        return total

    return _in_halves(builder, emit, total, unsigned, signed)


def dot_vnni(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Each int32 lane's total plus its four products."""

    def emit(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
        words = [builder.bitcast(each, _INTS) for each in (unsigned, signed)]
        return call(builder, "x86.avx512.vpdpbusd.256", _INTS, total, *words)

    return _in_halves(builder, emit, total, unsigned, signed)
