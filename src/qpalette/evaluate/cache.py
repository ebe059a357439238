"""A coded cache for a model: what `--cache` means, and where the transforms of its keys come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qpalette.calibration.cache_moments import KeyMoments, key_moments
from qpalette.core.cache import private_folder
from qpalette.evaluate.sampled_text import Progress, mark_of, sample_windows
from qpalette.evaluate.text_source import context_of
from qpalette.kvcache import BALANCED, CACHE_PLAN_FILE, WHITE, CachePlan, Transform, balanced, mean_removed, parse_cache
from qpalette.kvcache.plan import read_cache_plan
from qpalette.kvcache.stored import TRANSFORMS_FILE, read_transforms, write_transforms
from qpalette.nn.coded_cache import CodedCache, check_cacheable

WINDOWS, WINDOW = 16, 256  # of text that the model writes: 4096 tokens, where 1024 were found to be enough
SHORTEST = 2048  # context that moments are taken over: one calibration serves all shorter ones
SEED = 2_000_000  # of that text: no other measurement reads it


def make_transforms(moments: Sequence[KeyMoments], plan: CachePlan) -> list[Transform]:
    """Of each layer's keys, for a plan that is not white."""
    made = []
    for moment in moments:
        mean, covariance = moment.mean, moment.covariance
        both = balanced(mean, covariance, moment.queries) if plan.transform == BALANCED else None
        made.append(both or mean_removed(mean, covariance))
    return made


def transforms_for(
    model: Any,
    tokenizer: Any,
    plan: CachePlan,
    length: int,
    windows: Sequence[torch.Tensor] | None = None,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> list[Transform] | None:
    """Transforms for a cache of `length` tokens; None where the plan needs none.

    From `windows` of text, where they are given; from the file that a quantized `directory` has; else from text that
    the model writes, once: they are kept under QPALETTE_CACHE, by the model's content and by the context.
    """
    layers = check_cacheable(model.config)
    if plan.transform == WHITE:
        return None
    stored = None if directory is None else directory / TRANSFORMS_FILE
    if windows is None and stored is not None and stored.exists():
        return read_transforms(stored, layers)
    context = _context(model, length)
    skip = plan.exact.sinks
    if windows is not None:
        return make_transforms(key_moments(model, windows, context, skip), plan)
    folder = private_folder("transforms")
    mark = mark_of(model)
    kept = folder / f"{mark}-{plan.transform}-{context}-{skip}.safetensors"
    if not kept.exists():
        texts = sample_windows(
            model, tokenizer, WINDOWS, min(WINDOW, context), SEED, folder / f"{mark}.tokens.json", progress
        )
        made = make_transforms(key_moments(model, texts, context, skip), plan)
        write_transforms(kept, made, {"context": str(context), "transform": plan.transform, "text": "sampled"})
    return read_transforms(kept, layers)


def _context(model: Any, length: int) -> int:
    """The power of two that holds `length` tokens, but no more than the model's own context."""
    rounded = max(SHORTEST, 1 << (length - 1).bit_length())
    return min(rounded, context_of(model) or rounded)


def stored_plan(directory: Path) -> CachePlan | None:
    """The cache plan in a quantized model's directory. Raises SpecError for one that cannot be read."""
    file = directory / CACHE_PLAN_FILE
    return read_cache_plan(file) if file.exists() else None


def make_cache(
    model: Any,
    spec: str | CachePlan,
    max_length: int,
    *,
    tokenizer: Any = None,
    padding: torch.Tensor | None = None,
) -> CodedCache:
    """As `qpalette.cache`, whose arguments these are."""
    plan = parse_cache(spec) if isinstance(spec, str) else spec
    directory = Path(model.config.name_or_path or ".")
    transforms = transforms_for(model, tokenizer, plan, max_length, directory=directory)
    return CodedCache(model.config, plan, max_length, transforms, padding)
