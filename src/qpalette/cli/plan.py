"""qpalette plan: what a budget buys, exactly."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qpalette.cli import plan_options as option
from qpalette.cli.output import check_folder, print_facts, print_json, print_note, print_table, write_text
from qpalette.core.text import count

if TYPE_CHECKING:
    from qpalette.calibration import HessianStore
    from qpalette.pipeline.planning import BudgetPlan
    from qpalette.plan import Budget, Sensitivities, Space
    from qpalette.storage import Checkpoint

FRONT_POINTS = 48
MOST_CONTEXT = 1 << 20  # of a model that does not say


def plan(
    model: option.Model = None,
    sensitivity: option.Sensitivity = None,
    calibration: option.Calibration = None,
    device: option.Device = "cpu",
    bits: option.Bits = None,
    disk: option.Disk = None,
    memory: option.Memory = None,
    context: option.Context = "4096",
    max_loss: option.MaxLoss = None,
    cache_out: option.CacheOut = None,
    batch: option.Batch = 1,
    tokens_per_second: option.TokensPerSecond = None,
    profile: option.Profile = None,
    fusion: option.Fusion = "free",
    effort: option.Effort = "standard",
    family: option.Family = None,
    prefer: option.Prefer = None,
    target: option.Target = None,
    also: option.Also = None,
    experts: option.Experts = "tiers",
    rotation: option.Rotation = "full",
    seed: option.Seed = 0,
    solver: option.Solver = "exact",
    out: option.Out = None,
    plot: option.Plot = None,
    report: option.Report = None,
    peers: option.Peers = None,
    as_json: option.AsJson = False,
) -> None:
    """Choose a quantizer for every linear: the least predicted loss within hard limits, any combination of them.

    Example: [bold]qpalette plan MODEL --calibration DIR --bits 3.25 --out plan.json[/]
    """
    if calibration is not None and (sensitivity is not None or model is None):
        raise typer.BadParameter("--calibration needs a MODEL and no --sensitivity: it has its own")
    tokens = _context(context, memory, max_loss)
    measured_peers = [] if peers is None else _peers(peers, report)
    prefer = prefer or ("balanced" if tokens_per_second is None else "quality")
    space = _space(effort, family or (), prefer, profile, target, batch, fusion, experts)
    budget = budget_of(bits, disk, memory, tokens_per_second)
    _check_before_the_work(tokens_per_second, space.profile, solver, plot, (out, report, cache_out))
    checkpoint = _checkpoint(model)
    options: dict[str, Any] = {"also": also or (), "solver": solver, "rotation": rotation, "seed": seed}
    if sensitivity is None and checkpoint is not None:
        _draft(budget, space, checkpoint, {**options, "context": tokens or 1})
    store = None
    if calibration is None or model is None:
        known = _sensitivities(model, sensitivity, checkpoint)
    else:
        known, store = of_calibration(model, calibration, rotation, seed, device)
    make = partial(_made, known, budget, space, checkpoint, {**options, "hessians": store})
    found = make(tokens) if tokens is not None else _longest(make, checkpoint, max_loss)
    _write(found, out, cache_out, plot)
    if report is not None:
        _write_page(report, found, budget, model or str(sensitivity), out, checkpoint, measured_peers)
    if as_json:
        from qpalette.report.plan_facts import plan_json

        print_json(plan_json(found))
    else:
        show_plan(found, str(budget))
        _say_next(model, out, calibration)


def _write(found: BudgetPlan, out: Path | None, cache_out: Path | None, plot: Path | None) -> None:
    if cache_out is not None:
        if found.plan.cache is None:
            raise typer.BadParameter(
                "--cache-out: no cache was planned; it needs --memory, and sensitivities of --cache"
            )
        write_text(cache_out, found.plan.cache.to_json())
    if out is not None:
        write_text(out, found.plan.to_json())
    if plot is not None:
        from qpalette.report.plan_plot import draw_plan

        draw_plan(found, plot, FRONT_POINTS)


def _write_page(
    file: Path,
    found: BudgetPlan,
    budget: Budget,
    name: str,
    out: Path | None,
    checkpoint: Checkpoint | None,
    peers: Sequence[dict[str, Any]],
) -> None:
    from qpalette.report.plan_page import plan_page

    command = f"{shlex.join(['qpalette', *sys.argv[1:]])}\nqpalette quantize MODEL OUT --plan {out or 'PLAN.json'}"
    write_text(file, plan_page(found, str(budget), command, name, checkpoint, peers))


def _space(
    effort: str,
    families: Sequence[str],
    prefer: str,
    profile: str | None,
    target: str | None,
    batch: int,
    fusion: str,
    experts: str,
) -> Space:
    """What a plan chooses from. Raises BadParameter for a word that is none of those known."""
    from qpalette.plan import EXPERTS, FUSIONS, LatencyProfile, Space, palette_of, preferred, profile_of, quick_part

    if fusion not in FUSIONS:
        raise typer.BadParameter(f"--fusion is one of {', '.join(FUSIONS)}")
    if experts not in EXPERTS:
        raise typer.BadParameter(f"--experts is one of {', '.join(EXPERTS)}")
    measured = None if profile is None else LatencyProfile.read(profile)
    palette = preferred(palette_of(effort, families), prefer, measured or profile_of(target))
    quick = None if measured else quick_part(palette, prefer, target)
    return Space(palette, measured, batch, fusion, experts, quick=quick)


def budget_of(bits: str | None, disk: str | None, memory: str | None, tokens_per_second: float | None = None) -> Budget:
    """What was typed. Raises SpecError for what is no rate or size."""
    from qpalette.core.rate import parse_rate
    from qpalette.plan import Budget, parse_size

    return Budget(
        None if bits is None else parse_rate(bits),
        None if disk is None else parse_size(disk),
        None if memory is None else parse_size(memory),
        tokens_per_second,
    )


def _checkpoint(model: str | None) -> Checkpoint | None:
    if model is None:
        return None
    from qpalette.storage import open_checkpoint

    return open_checkpoint(model)


def _peers(file: Path, report: Path | None) -> list[dict[str, Any]]:
    from qpalette.report.plan_page import read_peers

    if report is None:
        raise typer.BadParameter("--peers are points in the picture of --report: give it, too")
    return read_peers(file)


def _sensitivities(model: str | None, file: Path | None, checkpoint: Checkpoint | None) -> Sensitivities:
    """From the file, or measured now and kept: one Fisher pass over text that the model writes."""
    from qpalette.plan import Sensitivities

    if file is not None:
        found = Sensitivities.read(file)
        source = found.provenance.get("source")
        if checkpoint is not None and source not in (None, checkpoint.fingerprint) and "method" in found.provenance:
            print_note(f"{file} was measured on another checkpoint than {model}")
        return found
    if model is None or checkpoint is None:
        raise typer.BadParameter("give a MODEL, a --sensitivity file, or both")
    from qpalette.api import measure_sensitivities
    from qpalette.cli.output import quiet_transformers, step_bar
    from qpalette.core.cache import cache_directory

    kept = cache_directory() / "sensitivities" / f"{checkpoint.fingerprint}.json"
    if kept.exists():
        return Sensitivities.read(kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    print_note("no --sensitivity: measured now on text that the model writes, and kept; this takes minutes")
    quiet_transformers()
    with step_bar("sensitivities") as bar:
        return measure_sensitivities(model, kept, tokens=4096, progress=bar.show)


def of_calibration(
    model: str, directory: Path, rotation: str, seed: int, device: str
) -> tuple[Sensitivities, HessianStore]:
    """What was measured with a calibration, or is now."""
    from qpalette.api import calibrated_sensitivities
    from qpalette.calibration import HessianStore
    from qpalette.cli.output import quiet_transformers, step_bar

    quiet_transformers()
    with step_bar("sensitivities") as bar:
        known = calibrated_sensitivities(
            model, directory, rotation=rotation, seed=seed, device=device, progress=bar.show
        )
    return known, HessianStore.open(directory)


def _made(
    known: Sensitivities,
    budget: Budget,
    space: Space,
    checkpoint: Checkpoint | None,
    options: dict[str, Any],
    context: int,
) -> BudgetPlan:
    from qpalette.pipeline.planning import make_plan

    return make_plan(known, budget, space, checkpoint, **options, context=context)


def _draft(budget: Budget, space: Space, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    """The plan if every weight mattered alike, which minutes of measuring come after: what no plan can do is told by
    it."""
    from qpalette.models import find_groups
    from qpalette.pipeline.planning import even_sensitivities, make_plan

    known = even_sensitivities(find_groups(checkpoint, also=options["also"]).groups)
    make_plan(known, budget, space, checkpoint, **options)


def _check_before_the_work(
    tokens_per_second: float | None, profile: object, solver: str, plot: Path | None, files: tuple[Path | None, ...]
) -> None:
    """Sensitivities take minutes: what is wrong with the rest is told ahead of them."""
    from qpalette.plan.exact import check_solver

    if tokens_per_second is not None and profile is None:
        raise typer.BadParameter(
            "--tokens-per-second needs --profile: `qpalette profile` measures one, some come with it"
        )
    check_solver(solver)
    for file in files:
        if file is not None:
            check_folder(file)
    if plot is not None:
        from qpalette.report.pictures import check_picture

        check_picture(plot)


def _context(context: str, memory: str | None, max_loss: float | None) -> int | None:
    """None: the longest."""
    if context == "max":
        if memory is None:
            raise typer.BadParameter("--context max asks what --memory holds: give it, too")
        return None
    if max_loss is not None:
        raise typer.BadParameter("--max-loss goes with --context max")
    if not context.isdecimal() or not 0 < len(context) < 10:
        raise typer.BadParameter(f"--context is a number of tokens, or max, not {context[:20]}")
    return int(context)


def _longest(make: Callable[[int], BudgetPlan], checkpoint: Checkpoint | None, max_loss: float | None) -> BudgetPlan:
    from qpalette.pipeline.planning import longest_context

    config = {} if checkpoint is None else checkpoint.config.get("text_config") or checkpoint.config
    context, found = longest_context(make, config.get("max_position_embeddings") or MOST_CONTEXT, max_loss)
    print_note(f"the longest context is {context} tokens")
    return found


def show_plan(found: BudgetPlan, budget: str) -> None:
    from qpalette.report.plan_facts import facts_of, kinds_of

    total = found.planned.choice.loss or 1.0
    rows = [
        (
            kind["kind"],
            str(kind["linears"]),
            count(kind["weights"]),
            kind["least"] if kind["least"] == kind["most"] else f"{kind['least']} .. {kind['most']}",
            f"{kind['bits_per_weight']:.4f}",
            f"{100 * kind['loss'] / total:.1f} %",
        )
        for kind in kinds_of(found)
    ]
    print_table("Plan", ("linear", "times", "weights", "specs", "bits per weight", "of the loss"), rows)
    print_facts("What the budget buys", facts_of(found, budget))


def _say_next(model: str | None, out: Path | None, calibration: Path | None) -> None:
    if out is not None:
        guided = "" if calibration is None else f" --calibration {calibration}"
        print_note(f"now: qpalette quantize {model or 'MODEL'} OUT --plan {out}{guided}")
