"""Tokens per second, latency and memory of a model, measured the same way for a quantized one and its original."""

from qpalette.bench.breakdown import Share, breakdown
from qpalette.bench.decode import GENERATE, RUNNERS, Decoder, Speed, default_runner, measure_speed
from qpalette.bench.generate import check_steps, measure_generate
from qpalette.bench.models import PRESETS, Candidate, from_config, from_directory, read_config
from qpalette.bench.run import measure
from qpalette.bench.stages import stages

__all__ = [
    "GENERATE",
    "PRESETS",
    "RUNNERS",
    "Candidate",
    "Decoder",
    "Share",
    "Speed",
    "breakdown",
    "check_steps",
    "default_runner",
    "from_config",
    "from_directory",
    "measure",
    "measure_generate",
    "measure_speed",
    "read_config",
    "stages",
]
