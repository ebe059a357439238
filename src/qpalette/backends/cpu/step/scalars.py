"""Elementwise operations: what each makes of a value, and which arguments of torch's operator it reads.

An expression is compiled for float32 (values of 16 bits are widened, and the result is rounded once, as torch does) or
for int64. It is given three values, of which it reads as many as the operator has, and two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from qpalette.backends.cpu.step.kernels import exponential, scalar_kernel

Expression = Callable[[Any, Any, Any, Any, Any], Any]
_HALF_ROOT, _TANH_ROOT = math.sqrt(0.5), math.sqrt(2 / math.pi)


class Elementwise(NamedTuple):
    """`inputs` are arguments by name, tensors or numbers, `numbers` those that become s and t. `on` says for which
    values of the others it holds."""

    floats: Expression | None
    integers: Expression | None
    inputs: tuple[str, ...] = ("self",)
    numbers: tuple[str, ...] = ()
    on: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


_ONE = np.float32(1)
_PAIR = ("self", "other")


def _same(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return x


def _sum(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return x + y * s


def _difference(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return x - y * s


def _reverse_difference(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return y - x * s


def _product(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return x * y


def _chosen(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return y if x != 0 else z


def _larger(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return x if x > y or x != x else y


def _smaller(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return x if x < y or x != x else y


def _bounded(x, y, z, s, t):  # type: ignore[no-untyped-def]
    low = y if x < y else x
    return z if low > z else low


def _sigmoid(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return _ONE / (_ONE + exponential(-x))


def _silu(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return x / (_ONE + exponential(-x))


def _tanh(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return np.float32(math.tanh(x))


def _gelu(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return np.float32(x * 0.5 * (1 + math.erf(x * _HALF_ROOT)))


def _gelu_tanh(x, y, z, s, t):  # type: ignore[no-untyped-def]
    return np.float32(x * 0.5 * (1 + math.tanh(_TANH_ROOT * (x + 0.044715 * x * x * x))))


def _both(*expression: Any) -> tuple[Any, Any]:
    return expression[0], expression[0]


COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}

# By the operator's name, without the underscore of those that work in place.
ELEMENTWISE: dict[str, list[Elementwise]] = {
    "_to_copy": [Elementwise(*_both(_same))],
    "clone": [Elementwise(*_both(_same))],
    "copy": [Elementwise(*_both(_same), ("src",))],
    "fill": [Elementwise(*_both(_same), ("value",))],
    "add": [Elementwise(*_both(_sum), _PAIR, ("alpha",))],
    "sub": [Elementwise(*_both(_difference), _PAIR, ("alpha",))],
    "rsub": [Elementwise(*_both(_reverse_difference), _PAIR, ("alpha",))],
    "mul": [Elementwise(*_both(_product), _PAIR)],
    "div": [Elementwise(lambda x, y, z, s, t: x / y, None, _PAIR, on={"rounding_mode": None})],
    "neg": [Elementwise(*_both(lambda x, y, z, s, t: -x))],
    "abs": [Elementwise(*_both(lambda x, y, z, s, t: abs(x)))],
    "relu": [Elementwise(lambda x, y, z, s, t: x if x > 0 or x != x else np.float32(0), None)],
    "reciprocal": [Elementwise(lambda x, y, z, s, t: _ONE / x, None)],
    "sqrt": [Elementwise(lambda x, y, z, s, t: np.sqrt(x), None)],
    "rsqrt": [Elementwise(lambda x, y, z, s, t: _ONE / np.sqrt(x), None)],
    "exp": [Elementwise(lambda x, y, z, s, t: exponential(x), None)],
    "log": [Elementwise(lambda x, y, z, s, t: np.float32(math.log(x)), None)],
    "sin": [Elementwise(lambda x, y, z, s, t: np.float32(math.sin(np.float64(x))), None)],
    "cos": [Elementwise(lambda x, y, z, s, t: np.float32(math.cos(np.float64(x))), None)],
    "tanh": [Elementwise(_tanh, None)],
    "sigmoid": [Elementwise(_sigmoid, None)],
    "silu": [Elementwise(_silu, None)],
    "gelu": [
        Elementwise(_gelu, None, on={"approximate": "none"}),
        Elementwise(_gelu_tanh, None, on={"approximate": "tanh"}),
    ],
    "pow": [
        Elementwise(lambda x, y, z, s, t: x * x, None, on={"exponent": 2}),
        Elementwise(lambda x, y, z, s, t: x * x * x, None, on={"exponent": 3}),
        Elementwise(lambda x, y, z, s, t: np.sqrt(x), None, on={"exponent": 0.5}),
    ],
    "maximum": [Elementwise(*_both(_larger), _PAIR)],
    "minimum": [Elementwise(*_both(_smaller), _PAIR)],
    "clamp_min": [Elementwise(*_both(_larger), ("self", "min"))],
    "clamp_max": [Elementwise(*_both(_smaller), ("self", "max"))],
    "clamp": [
        Elementwise(*_both(_larger), ("self", "min"), on={"max": None}),
        Elementwise(*_both(_smaller), ("self", "max"), on={"min": None}),
        Elementwise(*_both(_bounded), ("self", "min", "max")),
    ],
    "where": [Elementwise(*_both(_chosen), ("condition", "self", "other"))],
    "masked_fill": [Elementwise(*_both(_chosen), ("mask", "value", "self"))],
    "eq": [Elementwise(*_both(lambda x, y, z, s, t: x == y), _PAIR)],
    "ne": [Elementwise(*_both(lambda x, y, z, s, t: x != y), _PAIR)],
    "lt": [Elementwise(*_both(lambda x, y, z, s, t: x < y), _PAIR)],
    "le": [Elementwise(*_both(lambda x, y, z, s, t: x <= y), _PAIR)],
    "gt": [Elementwise(*_both(lambda x, y, z, s, t: x > y), _PAIR)],
    "ge": [Elementwise(*_both(lambda x, y, z, s, t: x >= y), _PAIR)],
    "logical_not": [Elementwise(*_both(lambda x, y, z, s, t: x == 0))],
    "logical_and": [Elementwise(*_both(lambda x, y, z, s, t: (x != 0) & (y != 0)), _PAIR)],
    "logical_or": [Elementwise(*_both(lambda x, y, z, s, t: (x != 0) | (y != 0)), _PAIR)],
    "bitwise_and": [Elementwise(None, lambda x, y, z, s, t: x & y, _PAIR)],
    "bitwise_or": [Elementwise(None, lambda x, y, z, s, t: x | y, _PAIR)],
}


@lru_cache(maxsize=256)
def compute_kernel(name: str, place: int, integers: bool) -> Any:
    """The compiled expression of ELEMENTWISE[name][place]; None where it is the value itself."""
    operation = ELEMENTWISE[name][place]
    expression = operation.integers if integers else operation.floats
    if expression is _same:
        return None
    return scalar_kernel(f"{name} {place}", expression, integers)
