"""The whole thing in one call: a model's name in, a quantized directory out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qpalette.calibration.feedback import DAMPING
from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.rounding import OUTPUT_DAMPING, Rounding
from qpalette.codes import parse_spec
from qpalette.codes.trellis import EFFORT
from qpalette.core.errors import SpecError
from qpalette.core.rate import parse_rate
from qpalette.core.records import SIGNS, LinearGroup
from qpalette.kvcache import CachePlan, parse_cache
from qpalette.models import check_complete, find_groups
from qpalette.nn.coded_cache import check_cacheable
from qpalette.pipeline.forecast import forecast_seconds
from qpalette.pipeline.jobs import Estimate, estimate
from qpalette.pipeline.planning import even_sensitivities, make_plan
from qpalette.pipeline.quantize import Progress, quantize_checkpoint
from qpalette.pipeline.rehearsal import check_packable
from qpalette.pipeline.report import QuantizeReport
from qpalette.plan import (
    Budget,
    Plan,
    Sensitivities,
    Space,
    palette_of,
    parse_size,
    preferred,
    profile_of,
    quick_part,
    spec_for_bits,
    uniform_plan,
)
from qpalette.storage import Checkpoint, open_checkpoint


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    bits: str | float | Fraction | None = None,
    spec: str | None = None,
    plan: str | Path | Plan | None = None,
    size: str | int | None = None,
    sensitivity: str | Path | Sensitivities | None = None,
    effort: str | None = None,
    prefer: str = "balanced",
    target: str | None = None,
    rotation: str = "full",
    seed: int = 0,
    calibration: str | Path | None = None,
    hessians: str | Path | None = None,
    damping: float = DAMPING,
    output_damping: float = OUTPUT_DAMPING,
    equalize: bool = True,
    sign_seeds: int = 1,
    also: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    cache: str | CachePlan | None = None,
    device: str = "cpu",
    workers: int = 1,
    ray: str | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> QuantizeReport | Estimate:
    """Quantize the linears of `model` and put the result at `out`.

    `model` is a directory, a .gguf file or a Hub id. Say how far by one of

    - `bits`: a budget per weight in which everything stored counts; alike for all linears, or with `sensitivity`
      (a file of `qpalette sensitivity`) by the plan of least predicted loss;
    - `size`: bytes of the whole directory, such as "6GB", never exceeded; with `sensitivity` by plan, without as if
      every weight mattered alike; may be combined with `bits`;
    - `spec`: one quantizer for all linears, such as "tcq-3.25";
    - `plan`: a plan or its file, which states rotation and seed as well.

    `prefer` says which quantizers `bits` and `size` may take: "quality", those of least distortion; "balanced" or
    "speed", at each rate the fastest on `target` of at most 10 or 20 % more distortion than the least. `target` is what
    the model is to run on, "cpu" or "cuda": by default "cuda" where `device` is or the machine has one. On a CPU all
    three are the same (`qpalette.plan.preference`).

    `effort` is "fast", "standard" or "best", by default what a spec or plan says and else "standard". `rotation` is
    "full", "block" or "block-64". With `dry_run` nothing is written, and the Estimate of the run is returned.

    `calibration` is a directory that `qpalette.calibrate` has filled for this model (`hessians` is its older name):
    rounding is then calibrated, on the sides that were measured, with `damping` times its mean eigenvalue (loud ones
    clipped) added to each Hessian of an input, `output_damping` times to that of an output. With `equalize` the input's
    diagonal makes columns alike, for 16 bits per input in place of 1. `also` names what is left alone
    otherwise: "lm_head", "embed_tokens". `include` and `exclude` are patterns over the names of linears, of those in a
    plan as well: with `include` only what matches one is quantized, and what matches an `exclude` is not (all as in
    `find_groups`). `cache` is how the model keeps keys and values unless it is told otherwise, as `qpalette.cache`
    takes it, or "none", as they are; None: as the plan says, or as they are. `device` is where weights are encoded,
    such as "cuda"; `workers`, `ray` and `sign_seeds` as in `quantize_checkpoint`.

    Raises SpecError on options that mean nothing or do not fit the model, BudgetError naming the least that is possible
    on a budget that nothing fits, CheckpointError on a model that cannot be read, HessianError on Hessians that are
    missing or not usable, ArtifactError when `out` exists (see `quantize_checkpoint`).
    """
    if [bits is not None or size is not None, spec is not None, plan is not None].count(True) != 1:
        raise SpecError("give one of bits (such as 3.25) or size (6GB), a spec (tcq-3.25), and a plan")
    if effort is not None and effort not in EFFORT:
        raise SpecError(f"'{effort}' is not an effort: choose {', '.join(EFFORT)}")
    chosen = None if spec is None else parse_spec(spec)  # before a large model is fetched
    ready = Plan.read(plan) if isinstance(plan, (str, Path)) else plan
    known = Sensitivities.read(sensitivity) if isinstance(sensitivity, (str, Path)) else sensitivity
    if calibration is not None and hessians is not None:
        raise SpecError("calibration and hessians are two names of one option: give the first")
    directory = hessians if calibration is None else calibration
    store = None if directory is None else HessianStore.open(directory)
    rounding = Rounding(damping, output_damping, equalize)
    checkpoint = open_checkpoint(model)
    check_packable(checkpoint)
    coded = None if cache in (None, UNCODED) else cache_for(checkpoint, cache)
    wanted: dict[str, Any] = {"include": include, "exclude": exclude}
    if ready is not None:
        ready = ready if effort is None else ready.with_effort(effort)
        ready = _narrowed(ready, checkpoint, wanted) if include or exclude else ready
    elif chosen is not None:
        name = chosen.name if effort is None else chosen.with_effort(effort).name
        ready = uniform_plan(find_groups(checkpoint, also=also, **wanted).groups, name, rotation, seed)
    else:
        options: dict[str, Any] = {"hessians": store, "rounding": rounding, "device": device}
        wanted |= {"also": also}
        options |= {"rotation": rotation, "seed": seed}
        palette = preferred(palette_of(effort or "standard"), prefer, profile_of(target, device))
        space = Space(palette, quick=quick_part(palette, prefer, target, device))
        ready = _plan_within(checkpoint, bits, size, known, space, wanted, options)
    ready = ready if cache is None else replace(ready, cache=coded)
    if dry_run:
        check_complete(checkpoint)
        return replace(
            estimate(checkpoint, ready, store, rounding), seconds=forecast_seconds(checkpoint, ready, device)
        )
    base_model = None if Path(model).expanduser().exists() else str(model)
    return quantize_checkpoint(
        checkpoint,
        out,
        ready,
        hessians=store,
        rounding=rounding,
        sign_seeds=sign_seeds,
        progress=progress,
        device=device,
        workers=workers,
        ray=ray,
        overwrite=overwrite,
        base_model=base_model,
    )


UNCODED = "none"  # of a cache: keys and values as they are


def cache_for(checkpoint: Checkpoint, cache: str | CachePlan) -> CachePlan:
    """What it means for this model. Raises SpecError, and UnsupportedError for a model whose cache cannot be coded."""
    plan = parse_cache(cache) if isinstance(cache, str) else cache
    plan.of_layer(0, check_cacheable(AutoConfig.for_model(**checkpoint.config)))
    return plan


def _plan_within(
    checkpoint: Checkpoint,
    bits: str | float | Fraction | None,
    size: str | int | None,
    known: Sensitivities | None,
    space: Space,
    wanted: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Plan:
    """Uniform for bits alone; else as `make_plan` finds it, with every weight alike where nothing is known."""
    rate = None if bits is None else bits if isinstance(bits, Fraction) else parse_rate(str(bits))
    groups = find_groups(checkpoint, **wanted).groups
    if rate is not None and size is None and known is None:
        diagonal = SIGNS if options["hessians"] is None else options["rounding"].diagonal
        spec = spec_for_bits(groups, rate, space.palette, diagonal)
        return uniform_plan(groups, spec, options["rotation"], options["seed"])
    budget = Budget(rate, None if size is None else parse_size(str(size)))
    known = known or even_sensitivities(groups)
    return make_plan(known, budget, space, checkpoint, **wanted, **options).plan


def _narrowed(plan: Plan, checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> Plan:
    """The plan without the linears that are not wanted; its prediction was for all of them."""
    whole = find_groups(checkpoint)
    also = [group.name for group in whole.optional if group.name in plan.specs]
    kept = _names(find_groups(checkpoint, also=also, **wanted).groups)
    specs = {name: spec for name, spec in plan.specs.items() if name in kept or name not in _names(whole.all_groups)}
    if not specs:
        raise SpecError(
            f"no linear is left by {', '.join(f'{name} {value}' for name, value in wanted.items() if value)}"
        )
    launches = (tuple(name for name in launch if name in specs) for launch in plan.launches)
    return replace(
        plan,
        specs=specs,
        sensitivities={name: value for name, value in plan.sensitivities.items() if name in specs},
        launches=tuple(launch for launch in launches if launch),
        prediction={},
    )


def _names(groups: Sequence[LinearGroup]) -> set[str]:
    return {linear.name for group in groups for linear in group.linears}
