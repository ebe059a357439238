"""What can be known before any model is read: Shannon's bound, optimal scalar quantizers, optimal allocation."""

from qpalette.theory.allocation import Allocation, reverse_water_filling
from qpalette.theory.gaussian import distortion_bound, gap, gap_bits, gap_db, rate_bound
from qpalette.theory.lloyd_max import LloydMax, lloyd_max

__all__ = [
    "Allocation",
    "LloydMax",
    "distortion_bound",
    "gap",
    "gap_bits",
    "gap_db",
    "lloyd_max",
    "rate_bound",
    "reverse_water_filling",
]
