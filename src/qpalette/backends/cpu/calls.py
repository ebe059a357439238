"""Compiled kernels by the addresses of their machine code: so that one loop serves all, and is not compiled anew around
each. All have five arguments, int64, and return nothing."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SIGNATURE = (types.int64,) * 5


@lru_cache(maxsize=1024)
def address_of(kernel: Any) -> int:
    """Of the machine code of `kernel`, an `entry`, which is compiled where it is not."""
    kernel.compile(SIGNATURE)
    compiled = kernel.overloads[SIGNATURE]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


@intrinsic
def call(typing_context: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    """The kernel at `address`, with its arguments."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = context.call_conv.get_function_type(types.none, signature.args[1:])
        places = [cgutils.alloca_once(builder, each.pointee) for each in kind.args[:2]]  # result and exception: none
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [*places, *args[1:]])
        return context.get_dummy_value()

    return types.none(*[types.int64] * 6), codegen
