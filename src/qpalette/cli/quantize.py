"""qpalette quantize: a model in, a smaller model out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qpalette.cli import quantize_options as option
from qpalette.cli.output import print_facts, print_json, print_note, print_table, weight_bar
from qpalette.cli.quantize_options import DAMPING, OUTPUT_DAMPING
from qpalette.core.text import count, size

if TYPE_CHECKING:
    from qpalette.cli.output import Bar
    from qpalette.pipeline import Estimate, LinearResult, QuantizeReport

# Options that `pipeline.quantize` takes under their names.
ROUNDING = (
    *("bits", "spec", "effort", "rotation", "seed", "plan", "sensitivity", "prefer", "target", "calibration"),
    *("damping", "output_damping", "equalize", "device", "cache", "sign_seeds", "workers", "ray"),
)
AT_ONCE = 0.005  # seconds; a linear that takes less was finished by an earlier run


def quantize(
    model: option.Model,
    out: option.Out,
    bits: option.Bits = None,
    spec: option.Spec = None,
    plan: option.Plan = None,
    disk: option.Disk = None,
    memory: option.Memory = None,
    context: option.Context = None,
    batch: option.Batch = None,
    fast: option.Fast = False,
    best: option.Best = False,
    sensitivity: option.Sensitivity = None,
    effort: option.Effort = None,
    prefer: option.Prefer = "balanced",
    target: option.Target = None,
    rotation: option.Rotation = "full",
    seed: option.Seed = 0,
    calibration: option.Calibration = None,
    damping: option.Damping = DAMPING,
    output_damping: option.OutputDamping = OUTPUT_DAMPING,
    equalize: option.Equalize = True,
    sign_seeds: option.SignSeeds = 1,
    also: option.Also = None,
    include: option.Include = None,
    exclude: option.Exclude = None,
    cache: option.Cache = None,
    tune: option.Tune = False,
    text: option.Text = None,
    page: option.Page = None,
    tokens: option.Tokens = None,
    steps: option.Steps = None,
    device: option.Device = "cpu",
    workers: option.Workers = 1,
    ray: option.Ray = None,
    dry_run: option.DryRun = False,
    overwrite: option.Overwrite = False,
    as_json: option.AsJson = False,
) -> None:
    """Quantize a model. Interrupted, the same command goes on where it stopped.

    Say how far by --bits, --size, --memory or several of them: then the model is calibrated (on text that it writes, or
    on --text), measured, planned, rounded and tuned; --fast rounds at once. Or by --spec or --plan, for the rounding
    alone.

    Example: [bold]qpalette quantize SmolLM2-135M-Instruct.Q4_1.gguf OUT --bits 3.25[/]
    """
    given = dict(locals())
    _check_target(given)
    by_steps = fast or spec is not None or plan is not None or sensitivity is not None or calibration is not None
    if not by_steps:
        _check_recipe(given)
        _run_recipe(given)
        return
    _check_rounding(given)
    options: dict[str, Any] = {name: given[name] for name in ROUNDING} | {"size": disk}
    options |= {name: given[name] or () for name in ("also", "include", "exclude")}
    if tune and not dry_run:
        _quantize_and_tune(model, out, text, options, overwrite, as_json)
    else:
        _quantize(model, out, options, dry_run, overwrite, as_json)


def _check_target(given: dict[str, Any]) -> None:
    """What says how far: one way of them."""
    budget = any(given[name] is not None for name in ("bits", "disk", "memory"))
    if [budget, given["spec"] is not None, given["plan"] is not None].count(True) != 1:
        raise typer.BadParameter(
            "give one of --bits (such as 3.25), --size (6GB) or --memory (8GB), --spec (tcq-3.25), and --plan FILE"
        )
    if given["memory"] is None and (given["context"] is not None or given["batch"] is not None):
        raise typer.BadParameter("--context and --batch are what --memory must hold: give it, such as --memory 8GB")


def _check_recipe(given: dict[str, Any]) -> None:
    """Nothing that is of the rounding alone."""
    manual = {"--include": given["include"], "--also": given["also"], "--ray": given["ray"]}
    manual |= {"--workers": given["workers"] != 1, "--sign-seeds": given["sign_seeds"] != 1}
    manual |= {"--no-equalize": not given["equalize"], "--damping": given["damping"] != DAMPING}
    manual |= {"--output-damping": given["output_damping"] != OUTPUT_DAMPING}
    if name := next((name for name, value in manual.items() if value), None):
        raise typer.BadParameter(f"{name} is of the rounding alone: add --fast, or --calibration DIR")


def _run_recipe(given: dict[str, Any]) -> None:
    from qpalette.cli.recipe import run_recipe

    told = ("model", "out", "text", "tokens", "steps", "best", "effort", "dry_run", "page", "as_json")
    as_given = ("prefer", "target", "rotation", "seed", "cache", "device", "overwrite")
    run_recipe(
        **{name: given[name] for name in (*told, *as_given)},
        limits=(given["bits"], given["disk"], given["memory"]),
        context=4096 if given["context"] is None else given["context"],
        batch=1 if given["batch"] is None else given["batch"],
        exclude=given["exclude"] or (),
    )


def _check_rounding(given: dict[str, Any]) -> None:
    """Nothing that is of all steps together, or means nothing here."""
    if given["best"] or given["memory"] is not None:
        raise typer.BadParameter(
            "--best and --memory are of all steps together: leave out --fast, --spec, --plan, --sensitivity and "
            "--calibration"
        )
    if any(given[name] is not None for name in ("page", "tokens", "steps")):
        raise typer.BadParameter(
            "--report, --tokens and --steps are of all steps together; qpalette plan, calibrate and tune have them"
        )
    if given["text"] is not None and not given["tune"]:
        raise typer.BadParameter("--text is what is calibrated or tuned on: leave out --fast, or add --tune")
    damped = given["damping"] != DAMPING or given["output_damping"] != OUTPUT_DAMPING
    if given["calibration"] is None and (damped or not given["equalize"]):
        raise typer.BadParameter(
            "--damping, --output-damping and --no-equalize are of calibrated rounding: --calibration"
        )
    if given["sensitivity"] is not None and given["bits"] is None and given["disk"] is None:
        raise typer.BadParameter("--sensitivity decides how --bits or --size are spent: give one of them")


def _quantize(model: str, out: Path, options: dict[str, Any], dry_run: bool, overwrite: bool, as_json: bool) -> None:
    from qpalette.pipeline import Estimate
    from qpalette.pipeline import quantize as run

    if dry_run:
        estimate = run(model, out, **options, dry_run=True)
        assert isinstance(estimate, Estimate)
        _show_estimate(model, estimate, as_json)
        return
    start = time.perf_counter()
    with weight_bar("quantizing") as bar:
        report = run(model, out, **options, overwrite=overwrite, progress=_Timed(bar))
    assert not isinstance(report, Estimate)
    source_bytes = _source_bytes(model)
    if as_json:
        print_json(report_json(report, source_bytes))
    else:
        _show_report(report, source_bytes)
        print_note(f"{out}: done in {time.perf_counter() - start:.0f} s")


def _quantize_and_tune(
    model: str, out: Path, text: Path | None, options: dict[str, Any], overwrite: bool, as_json: bool
) -> None:
    from qpalette.cli.output import StageBars, quiet_transformers
    from qpalette.cli.tune import show_tuned
    from qpalette.tuning import quantize_and_tune

    quiet_transformers()
    with weight_bar("quantizing") as bar, StageBars() as watcher:
        report = quantize_and_tune(
            model, out, text, **options, overwrite=overwrite, progress=_Timed(bar), watcher=watcher
        )
    show_tuned(report, as_json)


class _Timed:
    """The pipeline's progress on a bar, whose speed leaves out what an earlier run has finished."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        self.last = time.perf_counter()
        self.working = False  # what an earlier run has finished comes first

    def __call__(self, done_weights: int, total_weights: int, linear: str, distortion: float) -> None:
        now = time.perf_counter()
        self.working = self.working or now - self.last >= AT_ONCE
        (self.bar.show if self.working else self.bar.skip)(done_weights, total_weights)
        self.last = now


def _source_bytes(model: str) -> int:
    from qpalette.storage import open_checkpoint

    return open_checkpoint(model).total_bytes


def distortion_by_kind(report: QuantizeReport) -> dict[str, dict[str, Any]]:
    """Linears of all layers together: how many, their weights, specs, counted rate and mean distortion by weights.

    With Hessians also `proxy`, the mean relative error of their outputs: embeddings and heads are rounded without.
    """
    from qpalette.models.kinds import linear_kind

    gathered = defaultdict(list)
    for linear in report.linears:
        gathered[linear_kind(linear.name)].append(linear)
    return {
        kind: {
            "linears": len(linears),
            "weights": (weights := sum(linear.bits.weights for linear in linears)),
            "specs": sorted({linear.record.spec for linear in linears}),
            "bits_per_weight": sum(linear.bits.total for linear in linears) / weights,
            "distortion": sum(linear.bits.weights * linear.distortion for linear in linears) / weights,
            **_output_error(linears),
        }
        for kind, linears in gathered.items()
    }


def spec_range(specs: Sequence[str]) -> str:
    """A few names, or the lowest and the highest rate of many."""
    from qpalette.codes import parse_spec

    ordered = sorted(specs, key=lambda spec: (parse_spec(spec).rate, spec))
    return ", ".join(ordered) if len(ordered) <= 2 else f"{ordered[0]} .. {ordered[-1]} ({len(ordered)})"


def _output_error(linears: Sequence[LinearResult]) -> dict[str, float]:
    """Of those that had a Hessian, by weights."""
    measured = [(linear.bits.weights, linear.proxy) for linear in linears if linear.proxy is not None]
    if not measured:
        return {}
    return {"proxy": sum(weights * error for weights, error in measured) / sum(weights for weights, _ in measured)}


def report_json(report: QuantizeReport, source_bytes: int) -> dict[str, Any]:
    """Keys that stay: output, source_bytes, bytes, bits_per_weight, distortion, packed, kinds."""
    from qpalette.pipeline.report import shares_json

    return {
        "output": report.output,
        "source_bytes": source_bytes,
        "bytes": report.tensor_bytes,
        "bits_per_weight": report.rate,
        "bits": report.bits.total,
        "weights": report.bits.weights,
        "distortion": report.distortion,
        "packed": shares_json(report.shares),
        "kinds": distortion_by_kind(report),
    }


def _show_report(report: QuantizeReport, source_bytes: int) -> None:
    rows = [
        (
            kind,
            str(facts["linears"]),
            count(facts["weights"]),
            spec_range(facts["specs"]),
            f"{facts['bits_per_weight']:.4f}",
            f"{facts['distortion']:.5f}",
            f"{facts['proxy']:.5f}" if "proxy" in facts else "",
        )
        for kind, facts in distortion_by_kind(report).items()
    ]
    columns = ("linear", "times", "weights", "spec", "bits per weight", "distortion", "of outputs")
    shown = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    print_table(
        "Quantized",
        columns[:shown],
        [row[:shown] for row in rows],
        caption="distortion: mean squared error / mean square, measured",
    )
    print_facts(
        str(report.output),
        {
            "size": f"{size(source_bytes)} before, {size(report.tensor_bytes)} after",
            "bits per weight": f"{float(report.rate):.4f} in {count(report.bits.weights)} weights, everything counted",
            "distortion": f"{report.distortion:.5f}",
            "packed": str(report.shares),
        },
    )


def _show_estimate(model: str, estimate: Estimate, as_json: bool) -> None:
    from qpalette.pipeline.report import shares_json

    if as_json:
        print_json(
            {
                "dry_run": True,
                "linears": estimate.linears,
                "weights": estimate.weights,
                "bits_per_weight": estimate.rate,
                "bits": estimate.bits.total,
                "specs": dict(estimate.specs),
                "source_bytes": estimate.source_bytes,
                "bytes": estimate.tensor_bytes,
                "disk_bytes": estimate.disk_bytes,
                "peak_memory_bytes": estimate.peak_memory_bytes,
                "seconds": estimate.seconds,
                "packed": shares_json(estimate.shares),
            }
        )
        return
    print_facts(
        f"{model}: nothing is written",
        {
            "linears": f"{estimate.linears}, {count(estimate.weights)} weights",
            "packed": str(estimate.shares),
            "quantizers": spec_range(list(estimate.specs)),
            "bits per weight": f"{float(estimate.rate):.4f}, everything counted",
            "size": f"{size(estimate.source_bytes)} before, {size(estimate.tensor_bytes)} after",
            "free disk needed": size(estimate.disk_bytes),
            "memory needed": f"about {size(estimate.peak_memory_bytes)}",
            "time needed": f"about {estimate.seconds:.0f} s" if estimate.seconds is not None else "not tried",
        },
    )
    if (warning := estimate.shares.warning()) is not None:
        print_note(warning)
