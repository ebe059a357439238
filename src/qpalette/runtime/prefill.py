"""How a prompt is multiplied: by floating numbers of 16 bits, or, where that is asked for, as int8.

In int8 a token, in the rotated basis, is a step times whole numbers, its largest value 127 of them; so is what the
codes of a matrix stand for, by the largest entry of their table. Both are near Gaussian there: one step will do. Sums
of products of whole numbers are exact, so a result does not depend on their order. It is multiplied by the step of the
token, and by the row's scale and the table's step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from qpalette.codes import parse_spec
from qpalette.core.environment import PREFILL
from qpalette.core.errors import InputError

logger = logging.getLogger(__name__)
FLOAT, INT8 = ROADS = ("float", "int8")
FEW_TOKENS = 128  # at once: so many are no prompt, and weights are decoded in registers for them
LARGEST = 127
MOST_INPUTS = (2**31 - 1) // LARGEST**2  # that no sum leaves int32
LEAST_EXPONENT = -119  # of what a token's largest value counts as at least: LARGEST over it is a float32


class Whole(NamedTuple):
    """Numbers as whole ones, int8, times steps, float32."""

    numbers: torch.Tensor
    steps: torch.Tensor


def prefill_road() -> str:
    """What $QPALETTE_PREFILL says. Raises InputError as `check_road`."""
    return check_road(os.environ.get(PREFILL) or FLOAT)


def check_road(road: str) -> str:
    """Raises InputError for what is no road."""
    if road not in ROADS:
        raise InputError(f"'{road}' is no way to multiply prompts (--prefill, {PREFILL}): choose {' or '.join(ROADS)}")
    return road


@contextmanager
def prefill_by(road: str | None) -> Iterator[None]:
    """This one in the meantime; None: as it is."""
    before = os.environ.get(PREFILL)
    if road is not None:
        os.environ[PREFILL] = road
    try:
        yield
    finally:
        os.environ.pop(PREFILL, None)
        if before is not None:
            os.environ[PREFILL] = before


def road_of(tokens: int, inputs: int) -> str:
    """For so many tokens at once and a matrix of so many inputs."""
    if tokens <= FEW_TOKENS or prefill_road() == FLOAT:
        return FLOAT
    if inputs > MOST_INPUTS:
        _warn_of_width(inputs)
        return FLOAT
    return INT8


def tokens_in_int8(x: torch.Tensor) -> Whole:
    """x [N, K], rotated -> [N, K] and [N, 1]."""
    return _rounded(x.float(), x.float().abs().amax(1, keepdim=True).clamp(min=2.0**LEAST_EXPONENT))


def weights_in_int8(values: torch.Tensor, spec: str) -> Whole:
    """What codes of `spec` stand for, without the scales of rows -> of the same shape, and one step."""
    return _rounded(values, torch.tensor(_largest_entry(spec), device=values.device))


@lru_cache(maxsize=1024)
def table_step(spec: str) -> float:
    """That of `weights_in_int8`."""
    return float(weights_in_int8(torch.zeros(1), spec).steps)


def product_in_int8(tokens: Whole, weights: Whole, row_scales: torch.Tensor) -> torch.Tensor:
    """[N, K], [M, K], float32 [M] -> float32 [N, M]."""
    sums = tokens.numbers.double() @ weights.numbers.double().T  # exact, as in int32
    return (sums.float() * tokens.steps) * (row_scales * weights.steps)


def _rounded(values: torch.Tensor, largest: torch.Tensor) -> Whole:
    """Divided by tensors: a number is multiplied by its reciprocal, which rounds twice."""
    whole = torch.full_like(largest, LARGEST)
    return Whole((values * (whole / largest)).round().to(torch.int8), largest / whole)


@lru_cache(maxsize=1024)
def _largest_entry(spec: str) -> float:
    return float(parse_spec(spec).entries().abs().max())


@cache
def _warn_of_width(inputs: int) -> None:
    logger.warning("int8 takes at most %d inputs: prompts through matrices of %d stay float", MOST_INPUTS, inputs)
