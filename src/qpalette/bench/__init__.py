"""Tokens per second, latency and memory of a model, measured the same way for a quantized one and its original."""

from qpalette.bench.breakdown import Share, breakdown
from qpalette.bench.decode import RUNNERS, Decoder, Speed, compile_options, default_runner, measure_speed
from qpalette.bench.models import PRESETS, Candidate, from_config, from_directory, read_config
from qpalette.bench.run import measure

__all__ = [
    "PRESETS",
    "RUNNERS",
    "Candidate",
    "Decoder",
    "Share",
    "Speed",
    "breakdown",
    "compile_options",
    "default_runner",
    "from_config",
    "from_directory",
    "measure",
    "measure_speed",
    "read_config",
]
