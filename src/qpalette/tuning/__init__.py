"""Codes fixed, everything that multiplies them tuned: KL to the original falls, at the same bits."""

from qpalette.tuning.after import quantize_and_tune
from qpalette.tuning.forecast import Forecast, forecast
from qpalette.tuning.options import Silent, Tuning, Watcher
from qpalette.tuning.run import TuneReport, tune

__all__ = ["Forecast", "Silent", "TuneReport", "Tuning", "Watcher", "forecast", "quantize_and_tune", "tune"]
