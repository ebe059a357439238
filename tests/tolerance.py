"""How far float32 may be from exact, and no further: a result of operands that were rounded to float16 must not pass.

A sum of n terms is rounded n times, each time by at most u = 2^-24 of a partial sum: by u / sqrt(3), in the root mean
square. Where the terms have random signs, no partial sum is larger than the whole, in the root mean square again, and
the roundings are independent: the error is at most u sqrt(n / 3) of the result, in the norm over many results, in any
order and with any number of accumulators. Steps that follow each other add their terms: the rotation's factors, the
product, the scale, the bias. The worst case of a single sum, n u sum |w x|, is about n times as much, and what float16
loses passes below it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch

UNIT = 2.0**-24
MARGIN = 1.5  # real errors were 0.1 to 0.7 of the bound without it, for 2 to 30,000 terms


def float32_error(terms: int) -> float:
    """Of a result with `terms` roundings, relative to its norm."""
    return MARGIN * UNIT * sqrt(terms / 3)


def check_float32(
    found: torch.Tensor, exact: Callable[..., torch.Tensor], operands: tuple[torch.Tensor, ...], terms: int
) -> None:
    """`found` is `exact(*operands)`, a function in float64, up to `terms` roundings to float32.

    It would not be if one of the operands had been rounded to float16: that is asserted for each.
    """
    wanted = exact(*operands)
    bound = float32_error(terms) * float(wanted.norm())
    assert float((found.detach().double() - wanted).norm()) <= bound
    for index, operand in enumerate(operands):
        rounded = (*operands[:index], operand.half().to(operand.dtype), *operands[index + 1 :])
        assert float((exact(*rounded) - wanted).norm()) > bound, f"float16 passes for operand {index}"
