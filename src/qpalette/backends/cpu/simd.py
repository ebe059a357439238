"""SIMD registers as first-class values inside numba functions.

Numba leaves vectorisation to LLVM's loop vectoriser, which gives up on the loops of a trellis (possible aliasing,
accumulators kept in memory). These few intrinsics write the vector instructions down instead, in LLVM's portable
vector types: the same code becomes AVX-512, AVX2 or NEON on the machine at hand.

`F` is a vector of 16 float32 lanes, `I` of 16 int32 lanes; `H` of 32 int16 lanes and `B` of 64 bytes are the same 64
bytes. One name, one instruction (`fmaf`: x * y + z, rounded once). Arrays are C-contiguous; an index counts elements.

Look-ups and dot products of bytes have no portable vector operation: `instructions` has them for AVX-512 and AVX2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from qpalette.backends.cpu import avx2, instructions

LANES = 16

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_SHORT = ir.IntType(16)
_BYTE = ir.IntType(8)


class Lanes(types.Type):
    def __init__(self, name: str, element: ir.Type, count: int) -> None:
        super().__init__(name=name)
        self.vector = ir.VectorType(element, count)


F = Lanes("float32x16", _FLOAT, LANES)
I = Lanes("int32x16", _INT, LANES)  # noqa: E741 - the counterpart of F
H = Lanes("int16x32", _SHORT, 2 * LANES)
B = Lanes("int8x64", _BYTE, 4 * LANES)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        super().__init__(dmm, fe_type, fe_type.vector)


def element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _splat(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_INT, 0))
    mask = ir.Constant(ir.VectorType(_INT, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


def _gather(builder: Any, data: Any, index: Any) -> Any:
    result = ir.Constant(F.vector, ir.Undefined)
    for lane in range(LANES):
        position = ir.Constant(_INT, lane)
        offset = builder.zext(builder.extract_element(index, position), ir.IntType(64))
        result = builder.insert_element(result, builder.load(builder.gep(data, [offset])), position)
    return result


def define_load(lanes: Lanes, alignment: int = 4) -> Any:
    @intrinsic
    def load(typing_context, array, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            pointer = element_pointer(context, builder, signature.args[0], *args)
            return builder.load(builder.bitcast(pointer, lanes.vector.as_pointer()), align=alignment)

        return lanes(array, types.intp), codegen

    return load


def define_load_splat(lanes: Lanes) -> Any:
    @intrinsic
    def load_splat(typing_context, array, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return _splat(
                builder, builder.load(element_pointer(context, builder, signature.args[0], *args)), lanes.vector
            )

        return lanes(array, types.intp), codegen

    return load_splat


def define_splat(lanes: Lanes, scalar: types.Type) -> Any:
    @intrinsic
    def splat(typing_context, value):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return _splat(builder, args[0], lanes.vector)

        return lanes(scalar), codegen

    return splat


def define(signature: tuple[types.Type, ...], emit: Callable[..., Any]) -> Any:
    """An intrinsic whose arguments and result have the fixed types `signature` = (result, *arguments)."""
    result, arguments = signature[0], signature[1:]
    count = len(arguments)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return emit(builder, *args)

    if count == 1:
        return intrinsic(lambda typing_context, a: (result(*arguments), codegen))
    if count == 2:
        return intrinsic(lambda typing_context, a, b: (result(*arguments), codegen))
    if count == 3:
        return intrinsic(lambda typing_context, a, b, c: (result(*arguments), codegen))
    return intrinsic(lambda typing_context, a, b, c, d: (result(*arguments), codegen))


def _call(name: str, vector: ir.VectorType, builder: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * len(args)), f"llvm.{name}"
    )
    return builder.call(function, args)


def _reduced(name: str, scalar: ir.Type, builder: Any, lanes: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(scalar, [lanes.type]), f"llvm.vector.reduce.{name}"
    )
    return builder.call(function, [lanes])


def _total(builder: Any, lanes: Any) -> Any:
    """In a tree: sixteen sums one after the other would wait for one another."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOAT, [_FLOAT, F.vector]), "llvm.vector.reduce.fadd.v16f32"
    )
    return builder.call(function, [ir.Constant(_FLOAT, -0.0), lanes], fastmath=("reassoc",))


def _define_load_wide(narrow: ir.Type, widen: Callable[..., Any]) -> Any:
    """Sixteen numbers of 16 bits, int16 in an array, as float32."""

    @intrinsic
    def load_wide(typing_context, array, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            vector = ir.VectorType(narrow, LANES)
            pointer = element_pointer(context, builder, signature.args[0], *args)
            return widen(builder, builder.load(builder.bitcast(pointer, vector.as_pointer()), align=2))

        return F(array, types.intp), codegen

    return load_wide


def _define_load_fields(width: int) -> Any:
    """Sixteen numbers of `width` bits that lie behind each other from the byte array[index] on, lowest bits first."""
    stored = ir.IntType(LANES * width)

    def spread(builder: Any, bits: Any) -> Any:
        if width == 8:
            return builder.zext(builder.bitcast(bits, ir.VectorType(_BYTE, LANES)), I.vector)
        words = max(1, LANES * width // 32)
        if LANES * width < 32:
            bits = builder.zext(bits, _INT)
        parts = builder.bitcast(bits, ir.VectorType(_INT, words))
        fields = LANES // words  # in each word
        mask = ir.Constant(ir.VectorType(_INT, LANES), [lane // fields for lane in range(LANES)])
        lanes = builder.shuffle_vector(parts, ir.Constant(parts.type, ir.Undefined), mask)
        places = ir.Constant(I.vector, [lane % fields * width for lane in range(LANES)])
        return builder.and_(builder.lshr(lanes, places), _splat_constant((1 << width) - 1, I))

    @intrinsic
    def load_fields(typing_context, array, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            pointer = element_pointer(context, builder, signature.args[0], *args)
            return spread(builder, builder.load(builder.bitcast(pointer, stored.as_pointer()), align=1))

        return I(array, types.intp), codegen

    return load_fields


def _define_butterfly(distance: int) -> Any:
    """a + b in the lane of a, a - b in that of b, for lanes `distance` apart, a power of two."""
    partners = ir.Constant(ir.VectorType(_INT, LANES), [lane ^ distance for lane in range(LANES)])
    signs = ir.Constant(F.vector, [-1.0 if lane & distance else 1.0 for lane in range(LANES)])

    def emit(builder: Any, lanes: Any) -> Any:
        partner = builder.shuffle_vector(lanes, ir.Constant(F.vector, ir.Undefined), partners)
        return _call("fma.v16f32", F.vector, builder, lanes, signs, partner)

    return define((F, F), emit)


def _define_load_quarter(lanes: Lanes) -> Any:
    @intrinsic
    def load_quarter(typing_context, array, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            count = lanes.vector.count // 4
            quarter = ir.VectorType(lanes.vector.element, count)
            pointer = element_pointer(context, builder, signature.args[0], *args)
            loaded = builder.load(builder.bitcast(pointer, quarter.as_pointer()), align=1)
            mask = ir.Constant(ir.VectorType(_INT, lanes.vector.count), [i % count for i in range(lanes.vector.count)])
            return builder.shuffle_vector(loaded, ir.Constant(quarter, ir.Undefined), mask)

        return lanes(array, types.intp), codegen

    return load_quarter


butterfly1, butterfly2, butterfly4, butterfly8 = (_define_butterfly(distance) for distance in (1, 2, 4, 8))
loadf = define_load(F)
loadi = define_load(I)
loadb = define_load(B, 1)
load_bfloat = _define_load_wide(
    _SHORT, lambda b, x: b.bitcast(b.shl(b.zext(x, I.vector), ir.Constant(I.vector, [16] * LANES)), F.vector)
)
load_half = _define_load_wide(ir.HalfType(), lambda b, x: b.fpext(x, F.vector))
load_fields1, load_fields2, load_fields4, load_fields8 = map(_define_load_fields, (1, 2, 4, 8))
load_quarterf = _define_load_quarter(F)  # the 16 bytes at array[index], four times
load_quarteri = _define_load_quarter(I)
load_quarterb = _define_load_quarter(B)
load_splatf = define_load_splat(F)
load_splati = define_load_splat(I)
load_splath = define_load_splat(H)
splatf = define_splat(F, types.float32)
splati = define_splat(I, types.int32)
splath = define_splat(H, types.int16)
splatb = define_splat(B, types.int8)


@intrinsic
def half_to_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 value of a float16 given as int16 bits."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _FLOAT)

    return types.float32(types.int16), codegen


@intrinsic
def float_to_half(typing_context, value):  # type: ignore[no-untyped-def]
    """The bits, int16, of the float16 that is nearest to a float32; ties to even."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), codegen


@intrinsic
def store(typing_context, array, index, value):  # type: ignore[no-untyped-def]
    """Write all lanes of a vector from array[index] on."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
        alignment = signature.args[0].dtype.bitwidth // 8
        builder.store(args[2], builder.bitcast(pointer, signature.args[2].vector.as_pointer()), align=alignment)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def store_narrow(typing_context, array, index, value):  # type: ignore[no-untyped-def]
    """Write the low bits of sixteen int32 lanes at the uint8 or uint16 array[index : index + 16]."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
        bits = signature.args[0].dtype.bitwidth
        narrow = builder.trunc(args[2], ir.VectorType(ir.IntType(bits), LANES))
        builder.store(narrow, builder.bitcast(pointer, narrow.type.as_pointer()), align=bits // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, I), codegen


@intrinsic
def prefetch(typing_context, array, index):  # type: ignore[no-untyped-def]
    """Ask for the cache line of array[index], which may lie outside, in the second cache: the first one waits for too
    few lines at a time."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        bytes_ = ir.IntType(8).as_pointer()
        pointer = builder.bitcast(element_pointer(context, builder, signature.args[0], *args), bytes_)
        arguments = [bytes_, _INT, _INT, _INT]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), arguments), "llvm.prefetch.p0i8"
        )
        builder.call(function, [pointer, _INT(0), _INT(2), _INT(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


@intrinsic
def gatherf(typing_context, table, index):  # type: ignore[no-untyped-def]
    """table[index] for sixteen int32 indices into a float32 array."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _gather(builder, context.make_array(signature.args[0])(context, builder, args[0]).data, args[1])

    return F(table, I), codegen


def _lookup32(builder: Any, low: Any, high: Any, index: Any) -> Any:
    found = instructions.look_up_floats(builder, low, high, index)
    if found is not None:
        return found
    table = cgutils.alloca_once(builder, F.vector, size=2)
    for half, vector in enumerate((low, high)):
        builder.store(vector, builder.gep(table, [ir.Constant(_INT, half)]), align=4)
    masked = builder.and_(index, ir.Constant(I.vector, [2 * LANES - 1] * LANES))
    return _gather(builder, builder.bitcast(table, _FLOAT.as_pointer()), masked)


lookup32 = define((F, F, F, I), _lookup32)  # (entries 0-15, entries 16-31, index): index mod 32 of a 32-entry table
addf = define((F, F, F), lambda b, x, y: b.fadd(x, y))
subf = define((F, F, F), lambda b, x, y: b.fsub(x, y))
mulf = define((F, F, F), lambda b, x, y: b.fmul(x, y))
fmaf = define((F, F, F, F), lambda b, x, y, z: _call("fma.v16f32", F.vector, b, x, y, z))
xori = define((I, I, I), lambda b, x, y: b.xor(x, y))
addi = define((I, I, I), lambda b, x, y: b.add(x, y))
muli = define((I, I, I), lambda b, x, y: b.mul(x, y))
andi = define((I, I, I), lambda b, x, y: b.and_(x, y))
ori = define((I, I, I), lambda b, x, y: b.or_(x, y))
shli = define((I, I, I), lambda b, x, y: b.shl(x, y))
shri = define((I, I, I), lambda b, x, y: b.lshr(x, y))
mini = define((I, I, I), lambda b, x, y: _call("smin.v16i32", I.vector, b, x, y))
maxi = define((I, I, I), lambda b, x, y: _call("smax.v16i32", I.vector, b, x, y))
largest = define((types.int32, I), lambda b, x: _reduced("smax.v16i32", _INT, b, x))
total = define((types.int32, I), lambda b, x: _reduced("add.v16i32", _INT, b, x))
totalf = define((types.float32, F), _total)
funnel_shift_right = define((I, I, I, I), lambda b, hi, lo, n: _call("fshr.v16i32", I.vector, b, hi, lo, n))
to_float = define((F, I), lambda b, x: b.sitofp(x, F.vector))
to_nearest = define((I, F), lambda b, x: b.fptosi(_call("rint.v16f32", F.vector, b, x), I.vector))
scalar_of_bits = define((types.float32, types.int32), lambda b, x: b.bitcast(x, _FLOAT))
bits_of_float = define((I, F), lambda b, x: b.bitcast(x, I.vector))
float_of_bits = define((F, I), lambda b, x: b.bitcast(x, F.vector))


def _where_less(builder: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), x, y)


where_lessf = define((F, F, F, F, F), _where_less)  # (a, b, x, y): x where a < b, else y
where_lessi = define((I, F, F, I, I), _where_less)
where_equal = define((F, I, I, F, F), lambda b, i, j, x, y: b.select(b.icmp_signed("==", i, j), x, y))


def _place_of_least(builder: Any, lanes: Any, places: Any) -> Any:
    least = _splat(builder, _reduced("fmin.v16f32", _FLOAT, builder, lanes), F.vector)
    found = builder.select(builder.fcmp_ordered("==", lanes, least), places, _splat_constant((1 << 31) - 1, I))
    return _reduced("smin.v16i32", _INT, builder, found)


# (lanes, places): the smallest place of those whose lane is smallest; none may be a NaN
place_of_least = define((types.int32, F, I), _place_of_least)


def _splat_constant(value: int, lanes: Lanes) -> ir.Constant:
    return ir.Constant(lanes.vector, [value] * lanes.vector.count)


def _select_bits(builder: Any, mask: ir.Constant, ones: Any, zeros: Any) -> Any:
    return builder.or_(builder.and_(ones, mask), builder.and_(zeros, builder.not_(mask)))


def _is_negative(builder: Any, lanes: Any) -> Any:
    return builder.icmp_signed("<", lanes, ir.Constant(B.vector, [0] * B.vector.count))


def _high_halves(builder: Any, even: Any, odd: Any) -> Any:
    kept = builder.lshr(even, _splat_constant(16, I))
    return builder.bitcast(_select_bits(builder, _splat_constant(-(1 << 16), I), odd, kept), H.vector)


def _low_halves(builder: Any, even: Any, odd: Any) -> Any:
    moved = builder.shl(odd, _splat_constant(16, I))
    return builder.bitcast(_select_bits(builder, _splat_constant(-(1 << 16), I), moved, even), H.vector)


def _low_bytes(builder: Any, even: Any, odd: Any) -> Any:
    moved = builder.shl(odd, _splat_constant(8, H))
    return builder.bitcast(_select_bits(builder, _splat_constant(0xFF, H), even, moved), B.vector)


def _high_bytes(builder: Any, even: Any, odd: Any) -> Any:
    kept = builder.lshr(even, _splat_constant(8, H))
    return builder.bitcast(_select_bits(builder, _splat_constant(0xFF, H), kept, odd), B.vector)


def _quad_sums(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    def picked(first: Any, second: Any, places: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_INT, LANES), [4 * (i // 4) + places[i % 4] for i in range(LANES)])
        return builder.shuffle_vector(first, second, mask)

    def neighbours_added(first: Any, second: Any) -> Any:
        even, odd = [0, LANES, 2, LANES + 2], [1, LANES + 1, 3, LANES + 3]
        return builder.fadd(picked(first, second, even), picked(first, second, odd))

    low, high = neighbours_added(a, b), neighbours_added(c, d)
    lefts, rights = [0, 1, LANES, LANES + 1], [2, 3, LANES + 2, LANES + 3]
    return builder.fadd(picked(low, high, lefts), picked(low, high, rights))


def _quarter_sums(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    def picked(first: Any, second: Any, quarters: list[int]) -> Any:
        places = [4 * quarter + i for quarter in quarters for i in range(4)]
        return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT, LANES), places))

    def neighbours_added(first: Any, second: Any) -> Any:
        return builder.fadd(picked(first, second, [0, 2, 4, 6]), picked(first, second, [1, 3, 5, 7]))

    return neighbours_added(neighbours_added(a, b), neighbours_added(c, d))


# Halves and bytes of two vectors side by side: the first's at even places (low in a lane), the second's at odd ones.
high_halves = define((H, I, I), _high_halves)
low_halves = define((H, I, I), _low_halves)
high_bytes = define((B, H, H), _high_bytes)
low_bytes = define((B, H, H), _low_bytes)
addh = define((H, H, H), lambda b, x, y: b.add(x, y))
mulh = define((H, H, H), lambda b, x, y: b.mul(x, y))
shlh = define((H, H, H), lambda b, x, y: b.shl(x, y))
shrh = define((H, H, H), lambda b, x, y: b.lshr(x, y))
shift_in_halves = define((H, H, H, H), lambda b, hi, lo, n: _call("fshr.v32i16", H.vector, b, hi, lo, n))
addb = define((B, B, B), lambda b, x, y: b.add(x, y))
bytes_of_words = define((B, I), lambda b, x: b.bitcast(x, B.vector))
where_negative = define((B, B, B, B), lambda b, sign, x, y: b.select(_is_negative(b, sign), x, y))
negateb = define((B, B), lambda b, x: b.neg(x))
lookup16 = define((B, B, B), instructions.lookup16)  # (entries, four times the same sixteen; index): index mod 16
lookup64 = define((B, B, B), instructions.lookup64)  # (entries, index): index mod 64
lookup128 = define((B, B, B, B), instructions.lookup128)  # (entries 0-63, entries 64-127, index): index mod 128
# (entries 0-63, entries 64-127, index, first): `first` in the place of each of the first sixteen entries
lookup128_but_first = define((B, B, B, B, B), instructions.lookup128_but_first)
# (total, a, b): each lane's total plus its four products, of unsigned a, or of levels plus MIDDLE, and signed b; beside
# levels, b is no -128.
dot_magnitudes = define((I, I, B, B), instructions.dot_magnitudes)
dot_levels = define((I, I, B, B), instructions.dot_levels)
dot_shorts = define((I, I, B, B), avx2.dot_shorts)  # (total, a, b): each lane's plus its two products of int16
# Bytes as int16, those at even places or at odd ones.
even_levels = define((B, B), lambda b, x: avx2.shorts(b, x, False))
odd_levels = define((B, B), lambda b, x: avx2.shorts(b, x, True))
andb = define((B, B, B), lambda b, x, y: b.and_(x, y))
xorb = define((B, B, B), lambda b, x, y: b.xor(x, y))
ones_where_negative = define((B, B), lambda b, x: b.sext(_is_negative(b, x), B.vector))  # all bits of a byte
# (a[0] + a[1]) + (a[2] + a[3]) of the four vectors, then that of their next four lanes, and so on.
quad_sums = define((F, F, F, F, F), _quad_sums)
quarter_sums = define((F, F, F, F, F), _quarter_sums)  # the four quarters of a added, then those of b, and so on


@intrinsic
def store_quarters(typing_context, array, index, stride, value):  # type: ignore[no-untyped-def]
    """Write the four quarters of a vector, `stride` elements apart, from array[index] on."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer, (_, _, stride, value) = element_pointer(context, builder, signature.args[0], *args[:2]), args
        count = value.type.count // 4
        for quarter in range(4):
            mask = ir.Constant(ir.VectorType(_INT, count), list(range(quarter * count, (quarter + 1) * count)))
            part = builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)
            builder.store(part, builder.bitcast(pointer, part.type.as_pointer()), align=1)
            pointer = builder.gep(pointer, [stride])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, value), codegen
