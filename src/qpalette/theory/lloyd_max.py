"""The best scalar quantizer of N(0, 1) for a given number of levels.

Sources: J. Max, "Quantizing for minimum distortion", IRE Trans. Information Theory 6 (1960), table I;
S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Information Theory 28 (1982), method I.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

MAX_LEVELS = 1024  # beyond, the small cells lose too many digits to cancellation
_TOLERANCE = 1e-8  # of the last step; Newton squares it, so what is left is rounding
_MAX_STEPS = 50


@dataclass(frozen=True)
class LloydMax:
    """A scalar quantizer of N(0, 1): ascending `codebook`, its mean squared error `distortion` (the source's is 1)."""

    codebook: tuple[float, ...]
    distortion: float


@cache
def lloyd_max(levels: int) -> LloydMax:
    """The optimal quantizer of N(0, 1) with `levels` levels, exactly symmetric, good to about 1e-12.

    Newton's method on the positive half of the codebook, for the condition that each level is the centroid of its
    cell, whose borders are half way to the neighbours. A centroid moves by less than its borders do, the Gaussian
    being log-concave, so the tridiagonal system is diagonally dominant and the solution unique (Kieffer 1982). The
    start is the asymptotic optimum, spread as the density to the power 1/3, which is N(0, 3) (Panter and Dite 1951).

    Raises ValueError when `levels` is not in 1..1024.
    """
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must be in 1..{MAX_LEVELS}, got {levels}")
    if levels == 1:
        return LloydMax((0.0,), 1.0)
    half = _positive_levels(levels)
    middle = (0.0,) if levels % 2 else ()
    codebook = (*(-level for level in reversed(half)), *middle, *half)
    mass, _ = _cells(_thresholds(half, levels % 2 == 1))
    distortion = 1.0 - 2 * math.fsum(p * level * level for p, level in zip(mass, half, strict=True))
    return LloydMax(codebook, distortion)


def _positive_levels(levels: int) -> list[float]:
    odd, wide = levels % 2 == 1, NormalDist(sigma=math.sqrt(3))
    half = [wide.inv_cdf((i + 0.5) / levels) for i in range((levels + 1) // 2, levels)]
    for _ in range(_MAX_STEPS):
        step = _newton_step(half, odd)
        half = _damped(half, step)
        if max(map(abs, step)) < _TOLERANCE:
            return half
    raise ArithmeticError(f"Lloyd-Max iteration for {levels} levels did not converge")


def _thresholds(half: list[float], odd: bool) -> list[float]:
    """Cell borders of the positive levels: the first (0, or half way to the middle level 0), midpoints, infinity."""
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(half)]
    return [half[0] / 2 if odd else 0.0, *midpoints, math.inf]


def _cells(borders: list[float]) -> tuple[list[float], list[float]]:
    """Mass and first moment of N(0, 1) between consecutive borders; erfc keeps the tail's relative accuracy."""
    upper, density = [math.erfc(t / math.sqrt(2)) / 2 for t in borders], [_density(t) for t in borders]
    mass = [a - b for a, b in itertools.pairwise(upper)]
    moment = [a - b for a, b in itertools.pairwise(density)]
    return mass, moment


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _newton_step(half: list[float], odd: bool) -> list[float]:
    borders = _thresholds(half, odd)
    mass, moment = _cells(borders)
    centroid = [m / p for m, p in zip(moment, mass, strict=True)]
    # A border t moves a centroid by |t - centroid| * density(t) / mass, and half a level's move is a border's.
    below = [(c - t) * _density(t) / (2 * p) for c, t, p in zip(centroid, borders, mass, strict=False)]
    above = [(t - c) * _density(t) / (2 * p) for c, t, p in zip(centroid[:-1], borders[1:], mass, strict=False)] + [0.0]
    if not odd:
        below[0] = 0.0  # the border at 0 is fixed by symmetry
    diagonal = [1 - a - b for a, b in zip(above, below, strict=True)]
    return _solve_tridiagonal(below, diagonal, above, [c - level for c, level in zip(centroid, half, strict=True)])


def _solve_tridiagonal(
    below: list[float], diagonal: list[float], above: list[float], right: list[float]
) -> list[float]:
    """Solve -below[i] x[i-1] + diagonal[i] x[i] - above[i] x[i+1] = right[i] by elimination; no pivot is needed,
    the matrix being diagonally dominant."""
    pivot, x = list(diagonal), list(right)
    for i in range(1, len(x)):
        factor = below[i] / pivot[i - 1]
        pivot[i] -= factor * above[i - 1]
        x[i] += factor * x[i - 1]
    x[-1] /= pivot[-1]
    for i in reversed(range(len(x) - 1)):
        x[i] = (x[i] + above[i] * x[i + 1]) / pivot[i]
    return x


def _damped(half: list[float], step: list[float]) -> list[float]:
    """`half + step`, the step halved until the levels stay positive and ascending."""
    scale = 1.0
    while True:
        moved = [level + scale * s for level, s in zip(half, step, strict=True)]
        if all(low < high for low, high in zip([0.0, *moved], moved, strict=False)):
            return moved
        scale /= 2
