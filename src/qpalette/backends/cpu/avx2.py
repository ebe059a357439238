"""What AVX2 has in the place of AVX-512's instructions on bytes and tables: the same results, in 256-bit halves.

Look-ups of sixteen bytes (vpshufb) or eight floats (vpermps) are joined by the bits of an index above those. Products
of bytes are summed in pairs as 16 bits, saturated (vpmaddubsw): what is multiplied here stays below that. AVX-VNNI,
where a processor has it, sums four in 32 bits at once (vpdpbusd).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import llvmlite.ir as ir
from llvmlite import binding
from numba.core import cgutils

_INT = ir.IntType(32)
_BYTES, _WORDS, _INTS = (ir.VectorType(ir.IntType(bits), 256 // bits) for bits in (8, 16, 32))
_FLOATS = ir.VectorType(ir.FloatType(), 8)


def call(builder: Any, name: str, result: ir.Type, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), args)


def _constant(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


_EIGHT = _constant(_WORDS, 8)


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
    shifted_in, masks = _WORDS if lanes == _BYTES else lanes, []
    for place in range(bit, bit + len(found).bit_length() - 1):
        moved = builder.shl(builder.bitcast(index, shifted_in), _constant(shifted_in, lanes.element.width - 1 - place))
        masks.append(builder.bitcast(moved, lanes))
    return _picked(builder, found, masks)


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
    """Each int32 lane's total plus its four products."""
    return _in_halves(builder, dot_half_unsigned, total, unsigned, signed)


def dot_half_unsigned(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """The same, of 256 bits. Bytes at even places apart from those at odd ones: a pair of products may be above 32767,
    one is at most 32640."""
    for mask in (0x00FF, 0xFF00):
        words = builder.and_(builder.bitcast(unsigned, _WORDS), _constant(_WORDS, mask))
        total = builder.add(total, _pairs(builder, builder.bitcast(words, _BYTES), signed))
    return total


def shorts(builder: Any, levels: Any, odd: bool) -> Any:
    """Signed bytes at even places, or those at odd ones, as int16."""

    def emit(builder: Any, levels: Any) -> Any:
        words = builder.bitcast(levels, _WORDS)
        return builder.bitcast(builder.ashr(words if odd else builder.shl(words, _EIGHT), _EIGHT), _BYTES)

    return _in_halves(builder, emit, levels)


def signed_shorts(builder: Any, unsigned: Any, signs: Any, odd: bool) -> Any:
    """Unsigned bytes at even places, or those at odd ones, as int16 with the signs of other bytes. Of 256 bits."""
    words, signs = (builder.bitcast(each, _WORDS) for each in (unsigned, signs))
    words = builder.lshr(words, _EIGHT) if odd else builder.and_(words, _constant(_WORDS, 0xFF))
    signs = builder.or_(signs if odd else builder.shl(signs, _EIGHT), _constant(_WORDS, 1))  # what is 0 is positive
    return call(builder, "x86.avx2.psign.w", _WORDS, words, signs)


def shifted(builder: Any, words: Any, count: Any, left: bool) -> Any:
    """int16, all by the first of `count`: 16 bits leave nothing. Of 256 bits."""
    return call(builder, "x86.avx2.psll.w" if left else "x86.avx2.psrl.w", _WORDS, words, count)


def blended(builder: Any, even: Any, odd: Any) -> Any:
    """Of two vectors of int16, bytes side by side: the first's low ones, the second's high ones. Of 256 bits."""
    mask = ir.Constant(ir.VectorType(ir.IntType(1), _BYTES.count), [place % 2 for place in range(_BYTES.count)])
    return builder.select(mask, builder.bitcast(odd, _BYTES), builder.bitcast(even, _BYTES))


def high_bytes(builder: Any, even: Any, odd: Any) -> Any:
    return blended(builder, builder.lshr(even, _EIGHT), odd)


def low_bytes(builder: Any, even: Any, odd: Any) -> Any:
    return blended(builder, even, builder.shl(odd, _EIGHT))


def where_negative(builder: Any, signs: Any, one: Any, other: Any) -> Any:
    return call(builder, "x86.avx2.pblendvb", _BYTES, other, one, signs)


def look_up_hashed(builder: Any, tables: Any, index: Any, below: Any = None) -> Any:
    """Of the 128 bytes at `tables`, those at seven bits of an index. With `below`, the first sixteen entries are 64, of
    which its two highest bits choose, and lie behind the others: sixteen where both are 0, and so on. Of 256 bits.

    In assembly: LLVM looks up everything before it chooses, for which there are too few registers, and tests a bit by
    two instructions where one addition brings it to the place that a choice reads."""
    binding.initialize_native_asmparser()
    found = ["$0", "$1", "$2", "$3"]
    low, bits, bits_below = "$4", ["$7", "$6", "$5"], ["$8", "$12"]
    lines = [
        f"vpand $10, $11, {low}",
        "vpaddb $11, $11, $5",
        "vpaddb $5, $5, $6",
        "vpaddb $6, $6, $7",
        *(["vpaddb $12, $12, $8"] if below is not None else []),
        *_looked_up(0, bits, found, low, None if below is None else bits_below),
    ]
    operands = [tables, _constant(_BYTES, 15), index, *([] if below is None else [below])]
    written = 9
    kind = ir.FunctionType(ir.LiteralStructType([_BYTES] * written), [operand.type for operand in operands])
    constraints = ",".join(["=&x"] * written + ["r"] + ["x"] * (len(operands) - 1))
    return builder.extract_value(builder.asm(kind, "\n".join(lines), constraints, operands, False), 0)


def _looked_up(
    first: int, bits: Sequence[str], into: Sequence[str], low: str, of_first: Sequence[str] | None
) -> Iterator[str]:
    """Instructions that look up 2 ** len(bits) tables from `first` on and choose by these, the least first. The first
    table of all is four others where `of_first` chooses."""
    if bits:
        half = 1 << len(bits) - 1
        yield from _looked_up(first, bits[:-1], into, low, of_first)
        yield from _looked_up(first + half, bits[:-1], into[1:], low, of_first)
        yield f"vpblendvb {bits[-1]}, {into[1]}, {into[0]}, {into[0]}"
    elif first == 0 and of_first is not None:
        yield from _looked_up(8, of_first, into, low, None)
    else:
        yield f"vbroadcasti128 {16 * first}($9), {into[0]}"
        yield f"vpshufb {low}, {into[0]}, {into[0]}"


def _picked(builder: Any, found: Sequence[Any], masks: Sequence[Any]) -> Any:
    """Of a power of two, by the highest bits of `masks`, the least first. Of a comparison of bytes LLVM would make two
    instructions."""
    for mask in masks:
        if mask.type == _BYTES:
            pick = partial(call, builder, "x86.avx2.pblendvb", _BYTES)
            found = [pick(even, odd, mask) for even, odd in zip(found[::2], found[1::2], strict=True)]
        else:
            high = builder.icmp_signed("<", mask, _constant(mask.type, 0))
            found = [builder.select(high, odd, even) for even, odd in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def dot_shorts(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Each int32 lane's total plus its two products of int16."""

    def emit(builder: Any, total: Any, left: Any, right: Any) -> Any:
        words = [builder.bitcast(each, _WORDS) for each in (left, right)]
        return builder.add(total, call(builder, "x86.avx2.pmadd.wd", _INTS, *words))

    return _in_halves(builder, emit, total, left, right)


def dot_vnni(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Each int32 lane's total plus its four products."""

    def emit(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
        words = [builder.bitcast(each, _INTS) for each in (unsigned, signed)]
        return call(builder, "x86.avx512.vpdpbusd.256", _INTS, total, *words)

    return _in_halves(builder, emit, total, unsigned, signed)
