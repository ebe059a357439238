"""Sixteen SIMD lanes as first-class values inside numba functions.

Numba leaves vectorisation to LLVM's loop vectoriser, which gives up on the loops of a trellis (possible aliasing,
accumulators kept in memory). These few intrinsics write the vector instructions down instead, in LLVM's portable
vector types: the same code becomes AVX-512, AVX2 or NEON on the machine at hand.

`F` is a vector of 16 float32 lanes, `I` of 16 int32 lanes; one name, one instruction (`fmaf`: x * y + z, rounded
once). Arrays are C-contiguous; an index counts elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
_HAS_AVX512 = bool(get_host_cpu_features().get("avx512f", False))

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)


class _Lanes(types.Type):
    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=name)
        self.vector = ir.VectorType(element, LANES)


class _FloatLanes(_Lanes):
    pass


class _IntLanes(_Lanes):
    pass


F = _FloatLanes("float32x16", _FLOAT)
I = _IntLanes("int32x16", _INT)  # noqa: E741 - the counterpart of F


@register_model(_FloatLanes)
@register_model(_IntLanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: _Lanes) -> None:
        super().__init__(dmm, fe_type, fe_type.vector)


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _splat(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_INT, 0))
    mask = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


def _gather(builder: Any, data: Any, index: Any) -> Any:
    result = ir.Constant(F.vector, ir.Undefined)
    for lane in range(LANES):
        position = ir.Constant(_INT, lane)
        offset = builder.zext(builder.extract_element(index, position), ir.IntType(64))
        result = builder.insert_element(result, builder.load(builder.gep(data, [offset])), position)
    return result


def _define_load(lanes: _Lanes, alignment: int = 4) -> Any:
    @intrinsic
    def load(typing_context, array, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            pointer = _element_pointer(context, builder, signature.args[0], *args)
            return builder.load(builder.bitcast(pointer, lanes.vector.as_pointer()), align=alignment)

        return lanes(array, types.intp), codegen

    return load


def _define_load_splat(lanes: _Lanes) -> Any:
    @intrinsic
    def load_splat(typing_context, array, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return _splat(
                builder, builder.load(_element_pointer(context, builder, signature.args[0], *args)), lanes.vector
            )

        return lanes(array, types.intp), codegen

    return load_splat


def _define_splat(lanes: _Lanes, scalar: types.Type) -> Any:
    @intrinsic
    def splat(typing_context, value):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return _splat(builder, args[0], lanes.vector)

        return lanes(scalar), codegen

    return splat


def _define(signature: tuple[types.Type, ...], emit: Callable[..., Any]) -> Any:
    """An intrinsic whose arguments and result have the fixed types `signature` = (result, *arguments)."""
    result, arguments = signature[0], signature[1:]
    count = len(arguments)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return emit(builder, *args)

    if count == 1:
        return intrinsic(lambda typing_context, a: (result(*arguments), codegen))
    if count == 2:
        return intrinsic(lambda typing_context, a, b: (result(*arguments), codegen))
    return intrinsic(lambda typing_context, a, b, c: (result(*arguments), codegen))


def _call(name: str, vector: ir.VectorType, builder: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * len(args)), f"llvm.{name}"
    )
    return builder.call(function, args)


loadf = _define_load(F)
loadi = _define_load(I)
load_splatf = _define_load_splat(F)
load_splati = _define_load_splat(I)
splatf = _define_splat(F, types.float32)
splati = _define_splat(I, types.int32)


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
    """Write sixteen lanes (float32 or int32) at array[index : index + 16]."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, signature.args[2].vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def store_narrow(typing_context, array, index, value):  # type: ignore[no-untyped-def]
    """Write the low bits of sixteen int32 lanes at the uint8 or uint16 array[index : index + 16]."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
        bits = signature.args[0].dtype.bitwidth
        narrow = builder.trunc(args[2], ir.VectorType(ir.IntType(bits), LANES))
        builder.store(narrow, builder.bitcast(pointer, narrow.type.as_pointer()), align=bits // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, I), codegen


@intrinsic
def gatherf(typing_context, table, index):  # type: ignore[no-untyped-def]
    """table[index] for sixteen int32 indices into a float32 array."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _gather(builder, context.make_array(signature.args[0])(context, builder, args[0]).data, args[1])

    return F(table, I), codegen


def _lookup32(builder: Any, low: Any, high: Any, index: Any) -> Any:
    if _HAS_AVX512:
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(F.vector, [F.vector, I.vector, F.vector]), name
        )
        return builder.call(function, [low, index, high])
    table = cgutils.alloca_once(builder, F.vector, size=2)
    for half, vector in enumerate((low, high)):
        builder.store(vector, builder.gep(table, [ir.Constant(_INT, half)]), align=4)
    masked = builder.and_(index, ir.Constant(I.vector, [2 * LANES - 1] * LANES))
    return _gather(builder, builder.bitcast(table, _FLOAT.as_pointer()), masked)


lookup32 = _define((F, F, F, I), _lookup32)  # (entries 0-15, entries 16-31, index): index mod 32 of a 32-entry table
addf = _define((F, F, F), lambda b, x, y: b.fadd(x, y))
subf = _define((F, F, F), lambda b, x, y: b.fsub(x, y))
mulf = _define((F, F, F), lambda b, x, y: b.fmul(x, y))
fmaf = _define((F, F, F, F), lambda b, x, y, z: _call("fma.v16f32", F.vector, b, x, y, z))
xori = _define((I, I, I), lambda b, x, y: b.xor(x, y))
addi = _define((I, I, I), lambda b, x, y: b.add(x, y))
muli = _define((I, I, I), lambda b, x, y: b.mul(x, y))
andi = _define((I, I, I), lambda b, x, y: b.and_(x, y))
ori = _define((I, I, I), lambda b, x, y: b.or_(x, y))
shli = _define((I, I, I), lambda b, x, y: b.shl(x, y))
shri = _define((I, I, I), lambda b, x, y: b.lshr(x, y))
mini = _define((I, I, I), lambda b, x, y: _call("smin.v16i32", I.vector, b, x, y))
funnel_shift_right = _define((I, I, I, I), lambda b, hi, lo, n: _call("fshr.v16i32", I.vector, b, hi, lo, n))
to_float = _define((F, I), lambda b, x: b.sitofp(x, F.vector))
bits_of_float = _define((I, F), lambda b, x: b.bitcast(x, I.vector))
float_of_bits = _define((F, I), lambda b, x: b.bitcast(x, F.vector))
