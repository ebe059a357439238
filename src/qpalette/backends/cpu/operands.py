"""What a product takes, as records of addresses: a call of a compiled kernel passes one address of them, where each
array would cost its unboxing.

Vectors come and go in any of `TYPES`; kernels compute in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import inlined, kernel

_FLOAT32, _BFLOAT16, _FLOAT16 = range(3)
TYPES = {torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}

_ADDRESS = np.int64
MATRIX = np.dtype(
    [
        # int32 [block_rows, columns of blocks, words, LANES]; int16 [rows]
        *[("codes", _ADDRESS), ("block_rows", np.int64), ("tile_words", np.int64)],
        *[("scales", _ADDRESS), ("rows", np.int64)],
        # `decoders.Arrays`, and what 1 stands for in the table
        *[("words", _ADDRESS), ("turns", _ADDRESS), ("ends", _ADDRESS), ("numbers", _ADDRESS), ("table", _ADDRESS)],
        ("step", np.float64),
        # of the results, [tokens, rows]; what changes from call to call
        ("y", _ADDRESS),
    ]
)
LAUNCH = np.dtype(
    [
        ("features", np.int64),
        # the input's diagonal, uint8 (signs) or int16 (float16)
        *[("diagonal", _ADDRESS), ("has_signs", np.int64)],
        # `transform.Factors`
        *[("orders", _ADDRESS), ("inners", _ADDRESS), ("offsets", _ADDRESS), ("factors", np.int64)],
        *[("matrices", _ADDRESS), ("matrices_size", np.int64), ("scale", np.float64)],
        # MATRIX, `members` of them
        *[("multiplied", _ADDRESS), ("members", np.int64)],
    ]
)


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An address, int64, as `carray` takes it."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@inlined
def launch_at(address):  # type: ignore[no-untyped-def]
    return carray(pointer(address), 1, LAUNCH)[0]


@inlined
def matrix_at(launch, index):  # type: ignore[no-untyped-def]
    return carray(pointer(launch.multiplied), launch.members, MATRIX)[index]


@inlined
def address_after(address, count, type_):  # type: ignore[no-untyped-def]
    """Of what follows `count` values of `type_`."""
    return address + count * (4 if type_ == _FLOAT32 else 2)


@kernel
def read_values(address, type_, out):  # type: ignore[no-untyped-def]
    """Fill float32 `out` with as many values of `type_`."""
    if type_ == _FLOAT32:
        out[:] = carray(pointer(address), out.size, np.float32)
        return
    bits = carray(pointer(address), out.size, np.int16)
    if type_ == _BFLOAT16:
        wide = out.view(np.int32)
        for i in range(out.size):
            wide[i] = np.int32(bits[i]) << 16
    else:
        for i in range(out.size):
            out[i] = simd.half_to_float(bits[i])


@kernel
def write_values(values, type_, address):  # type: ignore[no-untyped-def]
    """Round float32 `values` to the nearest, ties to even, of `type_`."""
    if type_ == _FLOAT32:
        carray(pointer(address), values.size, np.float32)[:] = values
        return
    bits = carray(pointer(address), values.size, np.int16)
    if type_ == _BFLOAT16:
        wide = values.view(np.uint32)
        for i in range(values.size):
            kept = wide[i] >> 16
            rounded = (wide[i] + (kept & 1) + 0x7FFF) >> 16
            bits[i] = rounded if values[i] == values[i] else kept | 0x40  # a NaN stays one, whatever its low bits
    else:
        for i in range(values.size):
            bits[i] = simd.float_to_half(values[i])
