"""About how long each step will take, from headers and a few trials on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from qpalette.calibration.hessians import row_blocks
from qpalette.core.records import LinearShape
from qpalette.evaluate.sampled_text import BLOCK, BLOCK_ON_CPU
from qpalette.models import find_groups, token_tables
from qpalette.models.kinds import linear_kind
from qpalette.models.model_class import text_config
from qpalette.pipeline.forecast import forecast_seconds
from qpalette.plan import Plan
from qpalette.recipe.options import Recipe
from qpalette.runtime.device import parse_device
from qpalette.storage import Checkpoint, open_checkpoint

BACKWARD = 2  # times a forward, where weights need no gradient: once through the activations, once more as recomputed
HELD_OUT = 8  # windows of the calibration, at most, that sensitivities are measured on
CURVE = 5  # measurements with noise in all linears
TRIALS = 10
SECONDS_PER_LAYER = 6e-4  # of a step of a token: what transformers does beside the products, on one core of an EPYC
TWO_SIDED = 1.5  # times plain rounding: what feedback costs beside the search


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    seconds: float  # about


def forecast(model: str | Path, text: str | Path | None, plan: Plan, recipe: Recipe, device: str) -> list[Step]:
    """Of what `compress` would do for a plan like this one. Reads no weight; tries the device for seconds."""
    checkpoint, place = open_checkpoint(model), parse_device(device)
    linears = [linear for group in find_groups(checkpoint).groups for linear in group.linears]
    widest = max(linears, key=lambda linear: linear.weights)
    weights = sum(linear.weights for linear in linears) + _head(checkpoint)
    window = min(recipe.window, recipe.tokens)
    forward = _seconds_per_weight(widest, window, place) * weights  # of a window
    held_out = max(1, min(HELD_OUT, recipe.tokens // window // HELD_OUT))
    read = recipe.tokens // window
    measured = held_out if place.type == "cuda" else 1
    kinds = {linear_kind(linear.name) for linear in linears}
    bands = len(kinds) * recipe.bands + CURVE + len(token_tables(checkpoint))
    moments = sum(_moments(linear) for linear in linears) / weights
    tuning = recipe.tuning
    share = tuning.batch * min(tuning.window, window) / window
    looks = tuning.steps // tuning.every * tuning.held_out / tuning.batch
    steps = [
        Step("calibrate", f"{recipe.tokens} tokens", read * forward * (1 + BACKWARD + moments)),
        Step(
            "sensitivities",
            f"{bands} measurements",
            held_out * forward * (1 + BACKWARD + 2 * moments) + bands * measured * forward,
        ),
        Step("quantize", f"{len(plan.specs)} linears", TWO_SIDED * forecast_seconds(checkpoint, plan, place)),
        Step("tune", f"at most {tuning.steps} steps", share * forward * (tuning.steps * (3 + BACKWARD) + looks * 2)),
    ]
    if text is None:
        windows, block = read + held_out, BLOCK_ON_CPU if place.type == "cpu" else BLOCK
        whole, rest = divmod(windows, block)  # of a block all windows get a token at each step
        step = sum(
            count * _seconds_per_weight(widest, side, place) for count, side in ((whole, block), (1, rest)) if side
        )
        layers = text_config(checkpoint.config).get("num_hidden_layers", 0)
        seconds = window * (step * weights + (whole + (rest > 0)) * layers * SECONDS_PER_LAYER)
        steps.insert(0, Step("text", f"{windows * window} tokens, written by the model", seconds))
    return steps


def _head(checkpoint: Checkpoint) -> int:
    """Weights of the output head, tied or not: the largest matrix that is no linear of a layer."""
    sizes = [info.shape for info in checkpoint.tensors.values() if len(info.shape) == 2]
    vocabulary = checkpoint.config.get("vocab_size")
    return max((rows * columns for rows, columns in sizes if rows == vocabulary), default=0)


def _moments(linear: LinearShape) -> int:
    """Multiplications a token for H_I and H_O, as `weights` are for the product."""
    blocks = row_blocks(linear.out_features)
    return linear.in_features**2 + sum((block.stop - block.start) ** 2 for block in blocks)


def _seconds_per_weight(linear: LinearShape, tokens: int, device: torch.device) -> float:
    x = torch.randn(tokens, linear.in_features, device=device)
    weight = torch.randn(linear.out_features, linear.in_features, device=device)
    return _time(lambda: F.linear(x, weight), device) / linear.weights


def _time(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(TRIALS):  # the first one starts threads and picks kernels
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
