"""About how long each step will take, from headers and a few trials on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from qpalette.calibration.hessians import row_blocks
from qpalette.core.errors import InputError
from qpalette.core.records import LinearShape
from qpalette.evaluate.held_out import usual, windows_around
from qpalette.evaluate.sampled_text import side_by_side
from qpalette.models import find_groups, token_tables
from qpalette.models.experts import EXPERT
from qpalette.models.kinds import linear_kind
from qpalette.models.model_class import text_config
from qpalette.pipeline.forecast import forecast_seconds
from qpalette.plan import Plan
from qpalette.plan.memory import device_bytes
from qpalette.recipe.options import Recipe
from qpalette.runtime.device import parse_device
from qpalette.storage import Checkpoint, open_checkpoint

BACKWARD = 2  # times a forward, where weights need no gradient: once through the activations, once more as recomputed
CURVE = 5  # measurements with noise in all linears
TRIALS = 10
CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k")  # a config's names of it
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SECONDS_PER_LAYER = 2e-4  # of a step: what transformers does beside the products, on one core of an EPYC
CACHE_BYTES_PER_SECOND = 7e9  # of keys and values that a step reads there: 36 windows of SmolLM2
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
    weights = sum(map(_multiplied(checkpoint), linears)) + _head(checkpoint)
    window = min(recipe.window, recipe.tokens)
    forward = _seconds_per_weight(widest, window, place) * weights  # of a window
    read = recipe.tokens // window
    held_out = usual(read)
    measured = held_out if place.type == "cuda" else 1
    kinds = {linear_kind(linear.name) for linear in linears}
    bands = len(kinds) * recipe.bands + CURVE + len(token_tables(checkpoint))
    share = _multiplied(checkpoint)
    moments = sum(_moments(linear) * share(linear) / linear.weights for linear in linears) / weights
    tuning = recipe.tuning
    part = tuning.batch * min(tuning.window, window) / window
    looks = tuning.steps // tuning.every * tuning.held_out / tuning.batch
    originals = min(tuning.steps + looks, recipe.tokens / tuning.window / tuning.batch)  # it reads a window once
    steps = [
        Step("calibrate", f"{recipe.tokens} tokens", recipe.draws * read * forward * (1 + BACKWARD + moments)),
        Step(
            "sensitivities",
            f"{bands} measurements",
            held_out * forward * (1 + BACKWARD + 2 * moments) + bands * measured * forward,
        ),
        Step("quantize", f"{len(plan.specs)} linears", TWO_SIDED * forecast_seconds(checkpoint, plan, place)),
        Step(
            "tune",
            f"at most {tuning.steps} steps",
            part * forward * (tuning.steps * (1 + BACKWARD + tuning.recompute) + looks + originals),
        ),
    ]
    if text is None:
        per_weight = partial(_seconds_per_weight, widest, device=place)
        written = windows_around(read, window, held_out)
        seconds = _writing(checkpoint, written, window, place, lambda tokens: per_weight(tokens) * weights)
        steps.insert(0, Step("text", f"{written * window} tokens, written by the model", seconds))
    return steps


def _writing(
    checkpoint: Checkpoint, windows: int, window: int, device: torch.device, products: Callable[[int], float]
) -> float:
    """Seconds for text in blocks of windows that get a token at each step: `products` of so many tokens, what
    transformers does beside them, and a cache of half a window on average to read."""
    layers = text_config(checkpoint.config).get("num_hidden_layers", 0)
    try:
        cache = 2 * device_bytes(checkpoint.config, window, 1)[0]  # in float32
    except InputError:  # of a config that says nothing of heads
        cache = 0
    block = side_by_side(device, cache)
    sides = [block] * (windows // block) + [windows % block] * (windows % block > 0)
    known = {side: products(side) for side in set(sides)}
    steps = (known[side] + layers * SECONDS_PER_LAYER + side * cache / 2 / CACHE_BYTES_PER_SECOND for side in sides)
    return window * sum(steps)


def _multiplied(checkpoint: Checkpoint) -> Callable[[LinearShape], float]:
    """How many of a linear's weights multiply for a token: of an expert those of the chosen share."""
    text = text_config(checkpoint.config)
    counts = (next((text[name] for name in names if text.get(name)), 1) for names in (CHOSEN, EXPERTS))
    chosen, experts = counts
    return lambda linear: linear.weights * (chosen / experts if EXPERT.fullmatch(linear.name) else 1)


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
