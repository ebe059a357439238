"""Shannon's bound for a Gaussian source, and how far from it a quantizer is.

Rates are bits per weight; a distortion is the mean squared error over the mean square of the source, dimensionless.
Source: Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 10.3.2.
"""

from __future__ import annotations

import math
from fractions import Fraction


def distortion_bound(rate: float | Fraction) -> float:
    """Least distortion of a Gaussian source at `rate` bits per weight: D(R) = 2^(-2R).

    Raises ValueError when `rate` is negative or not finite.
    """
    return 2.0 ** (-2 * _checked_rate(rate))


def rate_bound(distortion: float) -> float:
    """Least rate in bits per weight that reaches `distortion`: R(D) = max(0, log2(1/D) / 2).

    Raises ValueError when `distortion` is not positive (no finite rate reaches 0) or not finite.
    """
    return max(0.0, -0.5 * math.log2(_checked_distortion(distortion)))


def gap(distortion: float, rate: float | Fraction) -> float:
    """`distortion` over the bound at `rate`: 1.0 is Shannon's bound, larger is worse. Raises ValueError as above."""
    return 2.0 ** (2 * gap_bits(distortion, rate))


def gap_bits(distortion: float, rate: float | Fraction) -> float:
    """The gap as a rate: bits per weight spent beyond those that the bound asks for the same distortion."""
    return _checked_rate(rate) + 0.5 * math.log2(_checked_distortion(distortion))


def gap_db(distortion: float, rate: float | Fraction) -> float:
    """The gap in decibels of signal-to-noise ratio; one bit is 6.02 dB."""
    return 20 * math.log10(2) * gap_bits(distortion, rate)


def _checked_rate(rate: float | Fraction) -> float:
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate must be finite and not negative, got {rate}")
    return float(rate)


def _checked_distortion(distortion: float) -> float:
    if not 0 < distortion < math.inf:
        raise ValueError(f"distortion must be finite and positive, got {distortion}")
    return distortion
