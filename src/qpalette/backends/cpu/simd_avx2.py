"""SIMD registers of 256 bits inside numba functions, as `simd` has them of 512: where their order matters.

Of 512 bits, which AVX2 does not have, LLVM makes two vectors whose instructions alternate: twice as many values are
held, and with sixteen registers a quarter of the instructions moved them to memory. `W` is a vector of 16 int16
lanes, `Y` of 32 bytes, `V` of 8 int32 lanes.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from qpalette.backends.cpu import avx2
from qpalette.backends.cpu.simd import (
    Lanes,
    define,
    define_load,
    define_load_splat,
    define_splat,
    element_pointer,
)

HALF = 32  # bytes of a vector

_INT, _SHORT, _BYTE = ir.IntType(32), ir.IntType(16), ir.IntType(8)

W = Lanes("int16x16", _SHORT, HALF // 2)
Y = Lanes("int8x32", _BYTE, HALF)
V = Lanes("int32x8", _INT, HALF // 4)


@intrinsic
def load_repeated(typing_context, array, index):  # type: ignore[no-untyped-def]
    """The 16 bytes at array[index], twice."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        part = ir.VectorType(_BYTE, HALF // 2)
        pointer = element_pointer(context, builder, signature.args[0], *args)
        loaded = builder.load(builder.bitcast(pointer, part.as_pointer()), align=1)
        mask = ir.Constant(ir.VectorType(_INT, HALF), 2 * list(range(HALF // 2)))
        return builder.shuffle_vector(loaded, ir.Constant(part, ir.Undefined), mask)

    return Y(array, types.intp), codegen


@intrinsic
def element(typing_context, array, index):  # type: ignore[no-untyped-def]
    """array[index], which is not negative: numba would ask."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(element_pointer(context, builder, signature.args[0], *args))

    return array.dtype(array, types.intp), codegen


@intrinsic
def look_up_hashed(typing_context, table, index):  # type: ignore[no-untyped-def]
    """table[index mod 128], of bytes."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return avx2.look_up_hashed(builder, data, args[1])

    return Y(table, Y), codegen


@intrinsic
def look_up_hashed_tail(typing_context, table, index, below):  # type: ignore[no-untyped-def]
    """The same; but the first sixteen entries are four times as many: table[128 + 16 * q + index], for the two highest
    bits q of `below`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return avx2.look_up_hashed(builder, data, *args[1:])

    return Y(table, Y, Y), codegen


def _define_shift(left: bool) -> Any:
    @intrinsic
    def shift(typing_context, vector, counts, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            part = ir.VectorType(_SHORT, HALF // 4)
            pointer = element_pointer(context, builder, signature.args[1], *args[1:])
            count = builder.load(builder.bitcast(pointer, part.as_pointer()), align=2)
            return avx2.shifted(builder, args[0], count, left)

        return W(W, counts, types.intp), codegen

    return shift


# Every lane by the count in the first of eight int16 from array[index] on: 16 bits leave nothing.
shift_left, shift_right = _define_shift(True), _define_shift(False)
loadw, loady = define_load(W, 2), define_load(Y, 1)
load_splatw = define_load_splat(W)
splatv = define_splat(V, types.int32)
orw = define((W, W, W), lambda b, x, y: b.or_(x, y))
addw = define((W, W, W), lambda b, x, y: b.add(x, y))
mulw = define((W, W, W), lambda b, x, y: b.mul(x, y))
negatey = define((Y, Y), lambda b, x: b.neg(x))
# High or low bytes of two vectors of int16 side by side: the first's at even places, the second's at odd ones.
high_bytes = define((Y, W, W), avx2.high_bytes)
low_bytes = define((Y, W, W), avx2.low_bytes)
where_negative = define((Y, Y, Y, Y), avx2.where_negative)
dot_magnitudes = define((V, V, Y, Y), avx2.dot_half_unsigned)
# Unsigned bytes at even places, or at odd ones, as int16 with the signs of other bytes.
even_magnitudes = define((W, Y, Y), lambda b, x, signs: avx2.signed_shorts(b, x, signs, False))
odd_magnitudes = define((W, Y, Y), lambda b, x, signs: avx2.signed_shorts(b, x, signs, True))
