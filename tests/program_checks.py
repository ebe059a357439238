"""What programs of compiled calls are checked by: the work that they were recorded from."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qpalette.backends.cpu.step import Program, instructions_of
from qpalette.backends.cpu.step.program import Called

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
UNITS = 4  # in the last place of float32, between two polynomials for one function
Work = Callable[[], torch.Tensor]


def check(work: Work, change: Callable[[], None] = lambda: None, units: int = 0, native: bool = True) -> Program:
    """A program of `work` leaves what `work` makes, also once `change` has changed what it reads: equal, or within
    `units` in the last place of the largest. `native`: torch is not called."""
    result = torch.empty_like(work())
    with torch.no_grad():
        instructions = instructions_of(lambda: result.copy_(work()))
    assert not native or not [each.operation.function for each in instructions if isinstance(each, Called)]
    program = Program(instructions)
    for step in (lambda: None, change):
        step()
        result.zero_()
        program.replay()
        wanted = work()
        if units:
            finite = wanted.isfinite()
            assert torch.equal(result[~finite].nan_to_num(7), wanted[~finite].nan_to_num(7))
            unit = torch.finfo(wanted.dtype).eps * wanted[finite].double().abs().max()
            assert ((result - wanted)[finite].double().abs() <= units * unit).all()
        else:
            assert torch.equal(result.nan_to_num(7) if result.is_floating_point() else result, wanted.nan_to_num(7))
    return program


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
