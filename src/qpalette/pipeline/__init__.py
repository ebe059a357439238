"""From a checkpoint and a plan to a quantized model directory."""

from qpalette.pipeline.api import quantize
from qpalette.pipeline.forecast import forecast_seconds
from qpalette.pipeline.jobs import Estimate, estimate
from qpalette.pipeline.quantize import Progress, quantize_checkpoint
from qpalette.pipeline.report import REPORT_FILE, LinearResult, QuantizeReport

__all__ = [
    "REPORT_FILE",
    "Estimate",
    "LinearResult",
    "Progress",
    "QuantizeReport",
    "estimate",
    "forecast_seconds",
    "quantize",
    "quantize_checkpoint",
]
