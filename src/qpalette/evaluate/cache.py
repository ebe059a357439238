"""A coded cache for a model: what `--cache` means, and where the transforms of its keys come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qpalette.calibration.cache_moments import Cost, cost_of_noise, key_moments, stream_costs
from qpalette.core.cache import private_folder
from qpalette.core.errors import InputError
from qpalette.core.files import locked
from qpalette.evaluate.cache_baselines import BaselineCache, parse_baseline
from qpalette.evaluate.loading import bits_per_weight, load_model, plan_of
from qpalette.evaluate.metrics import Evaluation, evaluate_models
from qpalette.evaluate.metrics import Progress as MetricsProgress
from qpalette.evaluate.sampled_text import TOKEN_FILE, Progress, mark_of, sample_windows
from qpalette.evaluate.text_source import context_of, model_windows
from qpalette.evaluate.windows import WINDOW as WHOLE
from qpalette.kvcache import (
    CACHE_PLAN_FILE,
    EXACT,
    MOMENTS_FILE,
    WHITE,
    CachePlan,
    KeyMoments,
    Transform,
    key_transforms,
    parse_cache,
    read_cache_plan,
    read_moments,
    white,
    write_moments,
)
from qpalette.nn.coded_cache import CodedCache, check_cacheable
from qpalette.plan import CONTEXT, SensitiveStream
from qpalette.plan.streams import KINDS
from qpalette.storage import local_path

# Of text that the model writes: longer windows, of as many tokens in all or twice as many, took several times as long
# and no KL off. Of a text that is given they are as long as those that are evaluated, up to WHOLE, and so are more
# tokens: SmolLM2 loses an eighth less through vq-3.
WINDOWS, WINDOW = 16, 256
SHORTEST = 2048  # context that moments are taken over: one calibration serves all shorter ones
SEED = 2_000_000  # of that text: no other measurement reads it
NEAR = "vq-3"  # the plan at whose distortion sensitivities are measured: in the middle of what is planned
TEST_SEED = 1_000_000  # as that of `evaluate`


def transforms_for(
    model: Any,
    tokenizer: Any,
    plan: CachePlan,
    length: int,
    windows: Sequence[torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> list[Transform] | None:
    """Of each layer's keys, for a cache of `length` tokens; None where the plan needs none. Arguments and errors are
    those of `moments_for`."""
    if plan.transform == WHITE:
        return None
    return key_transforms(plan, moments_for(model, tokenizer, length, plan.exact.sinks, windows, progress))


def moments_for(
    model: Any,
    tokenizer: Any,
    length: int,
    sinks: int,
    windows: Sequence[torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> list[KeyMoments]:
    """Moments of the model's keys for a cache of `length` tokens, of which the first `sinks` are exact.

    Of `windows` of text, int64 [length] each, where they are given; from the file that the model's directory has; else
    of text that the model writes, once: they are kept under QPALETTE_CACHE, by the model's content and the context.

    Raises UnsupportedError for a model whose cache cannot be coded, InputError for a file that cannot be read.
    """
    layers = check_cacheable(model.config)
    stored = directory_of(model) / MOMENTS_FILE
    if windows is None and stored.exists():
        return read_moments(stored, layers)
    context = _context(model, length)
    if windows is not None:
        return key_moments(model, windows, context, sinks)
    folder, mark = private_folder("key_moments"), mark_of(model)
    kept = folder / f"{mark}-{context}-{sinks}.safetensors"
    if not kept.exists():
        with locked(folder / f"{mark}.partial", kept, wait=True):  # a server and an evaluation, say, begin together
            if not kept.exists():
                written = folder / f"{mark}{TOKEN_FILE}"
                texts = sample_windows(model, tokenizer, WINDOWS, min(WINDOW, context), SEED, written, progress)
                moments = key_moments(model, texts, context, sinks)
                write_moments(kept, moments, {"context": str(context), "text": "sampled"})
    return read_moments(kept, layers)


def stream_sensitivities(
    model: Any,
    tokenizer: Any,
    windows: Sequence[torch.Tensor],
    *,
    context: int | None = None,
    seed: int = 0,
    progress: MetricsProgress | None = None,
) -> tuple[SensitiveStream, ...]:
    """d(KL per token) / d(distortion) of all keys and of all values of each layer, by one backward pass a window; keys
    transformed as a cache of `context` tokens does it by default (None: of as many as the longest window has),
    calibrated on the same windows, int64 [length] each. Raises as `moments_for`, SpecError as `key_transforms`."""
    sinks, code = EXACT.sinks, parse_cache(NEAR)
    moments = moments_for(model, tokenizer, context or max(map(len, windows)), sinks, windows)
    transforms = [transform.to(model.device) for transform in key_transforms(code, moments)]
    shapes: dict[int, tuple[int, int, int]] = {}

    def probe(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[Cost, Cost]:
        shapes[layer] = (key.shape[1], key.shape[-1], value.shape[-1])
        plain = white(value.shape[-1]).to(value.device)
        return cost_of_noise(key, transforms[layer], sinks), cost_of_noise(value, plain, sinks)

    found = []
    for layer, costs in enumerate(stream_costs(model, windows, probe, seed, progress)):
        heads, *dims = shapes[layer]
        for kind, dim, cost in zip(KINDS, dims, costs, strict=True):
            found.append(SensitiveStream(layer, kind, heads, dim, float(cost)))
    return tuple(found)


def _context(model: Any, length: int) -> int:
    """The power of two that holds `length` tokens, but no more than the model's own context."""
    rounded = max(SHORTEST, 1 << (length - 1).bit_length())
    return min(rounded, context_of(model) or rounded)


def stored_plan(directory: Path) -> CachePlan | None:
    """The cache plan in a quantized model's directory: a file of its own, or a part of the plan that the model was made
    by. Raises SpecError for a file that cannot be read."""
    file = directory / CACHE_PLAN_FILE
    if file.exists():
        return read_cache_plan(file)
    whole = plan_of(directory)
    return None if whole is None else whole.cache


def planned_context(directory: Path) -> int | None:
    """How many tokens the cache of a quantized model's directory was planned for; None where nobody says."""
    whole = plan_of(directory)
    told = None if whole is None else whole.provenance.get(CONTEXT)
    return told if type(told) is int and told > 0 else None


def plan_for(model: Any, spec: str | CachePlan | None) -> CachePlan:
    """What `spec` says; None: the plan that the model's directory has. Raises InputError where there is none."""
    if spec is not None:
        return parse_cache(spec) if isinstance(spec, str) else spec
    stored = stored_plan(directory_of(model))
    if stored is None:
        raise InputError(f"{directory_of(model)} has no {CACHE_PLAN_FILE}: say which cache, such as vq-3")
    return stored


def directory_of(model: Any) -> Path:
    """Where transformers has read the model from."""
    return Path(model.config.name_or_path or os.curdir)


@dataclass(frozen=True)
class CacheEvaluation(Evaluation):
    """Of a model that reads all its keys and values, but for exact tokens, from a coded cache."""

    cache: str = ""
    context: int = 0  # tokens of a window
    cache_bits: float = 0.0  # stored bits per cached number: codes, scales, padding
    cache_bits_with_exact: float = 0.0  # the same with the exact tokens of one window, 16 bits each


@dataclass
class _Factory:
    """Makes the cache of each window, and keeps the last."""

    spec: str
    plan: CachePlan | None
    transforms: Sequence[Transform] | None
    length: int
    last: Any = None

    def __call__(self, model: Any) -> Any:
        if self.plan is not None:
            self.last = CodedCache(model.config, self.plan, self.length, self.transforms, own_exact=False)
        else:
            baseline = parse_baseline(self.spec)
            assert baseline is not None
            self.last = BaselineCache(model.config, *baseline)
        return self.last

    @property
    def exact(self) -> int:
        """Tokens of a window."""
        if self.plan is not None:
            return self.plan.exact.sinks + self.plan.exact.window
        baseline = parse_baseline(self.spec)
        return 0 if baseline is None else baseline[1] + baseline[0].window


def check_cache(spec: str) -> None:
    """Raises SpecError for a --cache that means nothing, before minutes of loading."""
    if parse_baseline(spec) is None:
        parse_cache(spec)


def evaluate_cache(
    model: Any,
    tokenizer: Any,
    spec: str | CachePlan,
    windows: Sequence[torch.Tensor],
    reference: Any = None,
    *,
    calibration: Sequence[torch.Tensor] | None = None,
    progress: MetricsProgress | None = None,
) -> CacheEvaluation:
    """KL from `reference`, by default `model` itself, with every token read through the cache that `spec` names.

    `windows` are int64 [context] each. `spec` is a plan, of `parse_cache`, or a baseline (`cache_baselines.py`). Keys
    are calibrated on the `calibration` windows, or as `moments_for` does. Raises as that, `parse_cache`,
    `evaluate_models`.
    """
    length = max(map(len, windows))
    plan = spec if isinstance(spec, CachePlan) else None if parse_baseline(spec) is not None else parse_cache(spec)
    made = None if plan is None else transforms_for(model, tokenizer, plan, length, calibration)
    factory = _Factory(str(spec), plan, made, length)
    found = evaluate_models(model, model if reference is None else reference, windows, progress, factory)
    bits, exact = float(factory.last.bits), min(factory.exact, length)
    return CacheEvaluation(
        **vars(found),
        cache=str(spec),
        context=length,
        cache_bits=bits,
        cache_bits_with_exact=(bits * (length - exact) + 16 * exact) / length,
    )


def evaluate_through_cache(
    model_dir: str | Path,
    spec: str,
    text: str | Path | None = None,
    windows: int | None = None,
    lengths: Sequence[int] = (WHOLE,),
    *,
    reference: str | Path | None = None,
    cache_text: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: MetricsProgress | None = None,
    writing: Progress | None = None,
) -> list[CacheEvaluation]:
    """`evaluate_cache` of the model at `model_dir`, for windows of each of `lengths`; models and texts as `evaluate`
    takes them. `cache_text` is what the transforms are calibrated on."""
    place = local_path(model_dir)
    model, tokenizer = load_model(place, device, dtype)
    other = None if reference is None else load_model(reference, device, dtype)[0]
    count = windows if text is not None else windows or 2
    found = []
    for length in lengths:
        chosen = model_windows(text, other or model, tokenizer, length, count, seed=TEST_SEED, progress=writing)
        known = None
        if cache_text is not None:
            known = model_windows(cache_text, model, tokenizer, min(WHOLE, len(chosen[0])), WINDOWS)
        result = evaluate_cache(model, tokenizer, spec, chosen, other, calibration=known, progress=progress)
        found.append(replace(result, bits_per_weight=bits_per_weight(place)))
    return found
