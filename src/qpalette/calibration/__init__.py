"""What the linears of a model read and how much each matters: moments, feedback, sensitivities."""

from qpalette.calibration.collect import MEMORY_BUDGET, Progress, collect_hessians
from qpalette.calibration.hessians import Calibration, HessianStore

__all__ = ["MEMORY_BUDGET", "Calibration", "HessianStore", "Progress", "collect_hessians"]
