"""The whole thing in one call: a model's name in, a quantized directory out."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from qpalette.checkpoint import find_groups, open_checkpoint
from qpalette.core.errors import SpecError
from qpalette.core.records import LinearGroup
from qpalette.pipeline.hessians import HessianStore
from qpalette.pipeline.jobs import Estimate, estimate
from qpalette.pipeline.quantize import Progress, quantize_checkpoint
from qpalette.pipeline.report import QuantizeReport
from qpalette.plan import spec_for_bits, uniform_plan
from qpalette.quantizers import parse_spec
from qpalette.quantizers.feedback import DAMPING
from qpalette.quantizers.trellis import EFFORT


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    bits: str | float | Fraction | None = None,
    spec: str | None = None,
    effort: str | None = None,
    rotation: str = "full",
    seed: int = 0,
    hessians: str | Path | None = None,
    damping: float = DAMPING,
    also: Sequence[str] = (),
    device: str = "cpu",
    progress: Progress | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> QuantizeReport | Estimate:
    """Quantize every linear of `model` alike and put the result at `out`.

    `model` is a directory, a .gguf file or a Hub id. Give either `bits`, a budget per weight in which everything
    stored counts, or `spec`, a quantizer such as "tcq-3.25". `effort` is "fast", "standard" or "best", by default
    "standard" with `bits` and what the name says with `spec`. `rotation` is "full", "block" or "block-64". With
    `dry_run` nothing is written, and the Estimate of the run is returned.

    `hessians` is a directory that `qpalette.calibrate` has filled for this model: rounding is then calibrated, with
    `damping` times the mean diagonal added to each Hessian. `also` names what is left alone otherwise: "lm_head",
    "embed_tokens" (`find_groups`). `device` is where weights are encoded, such as "cuda".

    Raises SpecError on options that mean nothing or do not fit the model, CheckpointError on a model that cannot be
    read, HessianError on Hessians that are missing or not usable, ArtifactError when `out` exists (see
    `quantize_checkpoint`).
    """
    if (bits is None) == (spec is None):
        raise SpecError("give either bits, such as 3.25, or a spec, such as tcq-3.25")
    if effort is not None and effort not in EFFORT:
        raise SpecError(f"'{effort}' is not an effort: choose {', '.join(EFFORT)}")
    chosen = None if spec is None else parse_spec(spec)  # before a large model is fetched
    store = None if hessians is None else HessianStore.open(hessians)
    checkpoint = open_checkpoint(model)
    groups = find_groups(checkpoint, also=also).groups
    if chosen is None:
        name = _spec_within(groups, bits, effort or "standard")
    else:
        name = chosen.name if effort is None else chosen.with_effort(effort).name
    plan = uniform_plan(groups, name, rotation, seed)
    if dry_run:
        return estimate(checkpoint, plan, store)
    base_model = None if Path(model).expanduser().exists() else str(model)
    return quantize_checkpoint(
        checkpoint,
        out,
        plan,
        hessians=store,
        damping=damping,
        progress=progress,
        device=device,
        overwrite=overwrite,
        base_model=base_model,
    )


def _spec_within(groups: Sequence[LinearGroup], bits: str | float | Fraction | None, effort: str) -> str:
    return spec_for_bits(groups, bits if isinstance(bits, Fraction) else str(bits), effort)
