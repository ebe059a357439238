"""Measures what the linears of a model read, for calibrated rounding."""

from qpalette.calibrate.collect import MEMORY_BUDGET, Progress, collect_hessians

__all__ = ["MEMORY_BUDGET", "Progress", "collect_hessians"]
