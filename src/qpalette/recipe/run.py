"""The story from a budget to a model: text, calibration, sensitivities, plan, rounding, tuning.

Each step goes on where it was stopped, when the same call is made again. What is measured on the model, which no budget
changes, is kept in the cache: the next size costs only its rounding and tuning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qpalette.api import cache_sensitivities, calibrate, calibrated_sensitivities
from qpalette.calibration.hessians import HessianStore
from qpalette.core.cache import limit_bytes, mark_used, private_folder
from qpalette.core.errors import CheckpointError, HessianError, SpecError, UnsupportedError
from qpalette.core.files import locked
from qpalette.evaluate.sampled_text import TOKEN_FILE
from qpalette.evaluate.text_source import check_text
from qpalette.kvcache import CachePlan
from qpalette.kvcache.vectors import BLOCK
from qpalette.models import check_complete, find_groups, token_tables
from qpalette.pipeline.api import UNCODED, cache_for
from qpalette.pipeline.output import Output
from qpalette.pipeline.planning import BudgetPlan, cached_streams, even_sensitivities, make_plan
from qpalette.pipeline.quantize import rehearsed_jobs
from qpalette.plan import Budget, SensitiveStream, Sensitivities, Space, palette_of
from qpalette.plan.preference import preferred, profile_of, quick_part
from qpalette.recipe.options import Recipe, recipe_of
from qpalette.storage import Checkpoint, open_checkpoint
from qpalette.tuning import Silent, TuneReport, Tuning, Watcher, quantize_and_tune

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 4  # of the windows one is held out, at most
MOMENTS = "moments"  # a folder of the cache
WRITTEN = f"text{TOKEN_FILE}"  # by `calibrate`, in its directory, where no text is given


@dataclass(frozen=True)
class Compressed:
    """What came of it: the plan, with its predicted KL, and KL on held-out text before and after tuning."""

    planned: BudgetPlan
    tuned: TuneReport


@dataclass(frozen=True)
class Wish:
    """What is asked for, checked as far as headers tell."""

    checkpoint: Checkpoint
    budget: Budget
    space: Space
    options: dict[str, Any]  # of `make_plan`
    streams: tuple[SensitiveStream, ...] = ()  # of a cache that is planned with the weights: its shapes

    @classmethod
    def of(
        cls,
        model: str | Path,
        out: str | Path,
        budget: Budget,
        *,
        text: str | Path | None = None,
        recipe: Recipe,
        context: int = 4096,
        batch: int = 1,
        prefer: str = "balanced",
        target: str | None = None,
        rotation: str = "full",
        seed: int = 0,
        exclude: Sequence[str] = (),
        cache: str | CachePlan | None = None,
        device: str = "cpu",
        overwrite: bool = False,
    ) -> Wish:
        """Raises as `compress`."""
        if budget.tokens_per_second is not None:
            raise SpecError("tokens per second need a profile: use qpalette plan")
        Output(Path(out).expanduser().resolve(), overwrite).check()
        check_text(text, model)
        checkpoint = open_checkpoint(model)
        palette = preferred(palette_of(recipe.effort), prefer, profile_of(target, device))
        options = {"context": context, "rotation": rotation, "seed": seed, "exclude": exclude, "device": device}
        options["cache"] = None if cache in (None, UNCODED) else cache_for(checkpoint, cache)
        planned = cache is None and budget.memory is not None
        streams = _streams(checkpoint, context * batch) if planned else ()
        space = Space(palette, batch=batch, quick=quick_part(palette, prefer, target, device))
        wish = cls(checkpoint, budget, space, options, streams).rehearsed()
        check_complete(checkpoint)
        return wish

    def rehearsed(self) -> Wish:
        """With embeddings and output head in the plan, or without where this class could not run that."""
        tables = token_tables(self.checkpoint)
        wish = replace(self, options=self.options | {"also": tables})
        try:
            rehearsed_jobs(self.checkpoint, wish.draft().plan)
        except CheckpointError as error:
            wish = replace(self, options=self.options | {"also": ()})
            rehearsed_jobs(self.checkpoint, wish.draft().plan)
            logger.warning("%s stay as they are: %s", ", ".join(tables), error)
        return wish

    def draft(self) -> BudgetPlan:
        """The plan if every weight mattered alike: known at once, and as large as the true one."""
        wanted = {name: self.options[name] for name in ("also", "exclude")}
        groups = find_groups(self.checkpoint, **wanted).groups
        even = even_sensitivities(groups, self.streams)
        return make_plan(even, self.budget, self.space, self.checkpoint, **self.options)

    def plan(self, known: Sensitivities, store: HessianStore) -> BudgetPlan:
        return make_plan(known, self.budget, self.space, self.checkpoint, hessians=store, **self.options)


def _streams(checkpoint: Checkpoint, tokens: int) -> tuple[SensitiveStream, ...]:
    """Of a cache of so many tokens, every number alike; none where the model's cache cannot be coded."""
    try:
        streams = cached_streams(checkpoint, tokens)
    except (UnsupportedError, KeyError, ValueError):  # ValueError: transformers knows no such model
        return ()
    return streams if streams and streams[0].dim % BLOCK == 0 else ()


def compress(
    model: str | Path,
    out: str | Path,
    budget: Budget,
    *,
    text: str | Path | None = None,
    recipe: Recipe | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    watcher: Watcher | None = None,
    **options: Any,
) -> Compressed:
    """The best model within `budget` (bits per weight, bytes on disk, bytes of device memory for `batch` sequences of
    `context` tokens) at `out`.

    `model` is a directory, a .gguf file or a Hub id. `text`, a UTF-8 file, is what it is calibrated and tuned on; None:
    the model writes it. `recipe` says how much each step may cost, by default what suits the device. `options` are
    context, batch, prefer, target, rotation, seed, exclude and cache, as in `quantize` and `make_plan`; embeddings and
    output head are planned with the linears unless `exclude` names them. Within a memory the codes of keys and values
    are planned with those of the weights, where the model's cache can be coded, unless `cache` says how they are kept.
    `watcher` is told of the stages "text", "calibrate", "sensitivities", "cache", "quantize", "original" and "tuning".

    Raises BudgetError naming the least that is possible, SpecError, InputError, CheckpointError and ArtifactError as
    the steps do; what can be known beforehand before the work.
    """
    recipe, watcher = recipe or recipe_of(False, device), watcher or Silent()
    wish = Wish.of(model, out, budget, text=text, recipe=recipe, device=device, overwrite=overwrite, **options)
    seed, rotation = wish.options["seed"], wish.options["rotation"]
    moments = moments_of(wish.checkpoint, text, recipe, seed)
    with locked(moments.with_name(f"{moments.name}.partial"), moments, wait=True):
        if not _is_whole(moments, wish.checkpoint):
            calibrate(
                model,
                moments,
                text,
                tokens=recipe.tokens,
                window=recipe.window,
                draws=recipe.draws,
                seed=seed,
                device=device,
                progress=_stage(watcher, "calibrate"),
                writing=_stage(watcher, "text"),
            )
        known = calibrated_sensitivities(
            model,
            moments,
            rotation=rotation,
            seed=seed,
            bands=recipe.bands,
            device=device,
            progress=_stage(watcher, "sensitivities"),
        )
        if wish.streams:
            known = replace(known, streams=_measured_streams(model, moments, wish, device, watcher))
    store = HessianStore.open(moments)
    found = wish.plan(known, store)
    tuned = quantize_and_tune(
        model,
        out,
        moments / WRITTEN if text is None else text,
        plan=found.plan,
        cache=wish.options["cache"],
        calibration=moments,
        tuning=replace(fitted(recipe.tuning, store.calibration.tokens), seed=seed),
        device=device,
        overwrite=overwrite,
        progress=lambda done, total, linear, distortion: watcher.progress("quantize", done, total),
        watcher=watcher,
    )
    mark_used(moments, limit_bytes())
    return Compressed(found, tuned)


def _measured_streams(
    model: str | Path, moments: Path, wish: Wish, device: str, watcher: Watcher
) -> tuple[SensitiveStream, ...]:
    """None where transformers does not show what the model's attention is given: its cache stays in 16 bits."""
    context, told = wish.options["context"], _stage(watcher, "cache")
    try:
        return cache_sensitivities(model, moments, context, device=device, progress=told)
    except UnsupportedError as error:
        logger.warning("the cache stays in 16 bits: %s", error)
        return ()


def fitted(tuning: Tuning, tokens: int) -> Tuning:
    """For a text of so few tokens: shorter windows and fewer held out, so that some are left to tune on."""
    window = max(2, min(tuning.window, tokens // 2))
    return replace(tuning, window=window, held_out=max(1, min(tuning.held_out, tokens // window // HELD_OUT_SHARE)))


def moments_of(checkpoint: Checkpoint, text: str | Path | None, recipe: Recipe, seed: int) -> Path:
    """Where the calibration of a model is kept: a name of all that it depends on."""
    content = None
    if text is not None:
        with open(Path(text).expanduser(), "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
    what = [checkpoint.fingerprint, content, recipe.tokens, recipe.window, recipe.draws, seed]
    return private_folder(MOMENTS) / hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _is_whole(moments: Path, checkpoint: Checkpoint) -> bool:
    """Whether nothing of the calibration is missing, without loading the model."""
    try:
        return not HessianStore.open(moments).missing(find_groups(checkpoint).groups)
    except HessianError:
        return False


def _stage(watcher: Watcher, name: str) -> Callable[[int, int], None]:
    return partial(watcher.progress, name)
