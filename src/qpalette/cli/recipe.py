"""qpalette quantize without --fast: all steps to the best model within a budget."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpalette.cli.output import (
    StageBars,
    check_folder,
    print_facts,
    print_json,
    print_note,
    print_table,
    quiet_transformers,
    write_text,
)
from qpalette.core.text import size

if TYPE_CHECKING:
    from qpalette.plan import Budget
    from qpalette.recipe import Compressed, Recipe

Limits = tuple[str | None, str | None, str | None]  # bits, size on disk, device memory


def run_recipe(
    model: str,
    out: Path,
    limits: Limits,
    text: Path | None,
    tokens: int | None,
    steps: int | None,
    best: bool,
    effort: str | None,
    dry_run: bool,
    page: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run it, or say what it would be. JSON keys that stay: output, bits_per_weight, predicted_kl, kl_before and
    kl_after."""
    from qpalette.cli.plan import budget_of
    from qpalette.recipe import compress, recipe_of

    recipe, budget = recipe_of(best, options["device"]).of(tokens, steps, effort, text is None), budget_of(*limits)
    if dry_run:
        return _show_forecast(model, out, budget, text, recipe, as_json, options)
    if page is not None:
        check_folder(page)
    quiet_transformers()
    start = time.perf_counter()
    with StageBars() as watcher:
        found = compress(model, out, budget, text=text, recipe=recipe, watcher=watcher, **options)
    if page is not None:
        _write_page(page, model, found, budget)
    _show(found, budget, as_json)
    if not as_json:
        print_note(f"{out}: done in {time.perf_counter() - start:.0f} s")


def _show_forecast(
    model: str, out: Path, budget: Budget, text: Path | None, recipe: Recipe, as_json: bool, options: dict[str, Any]
) -> None:
    from qpalette.recipe import Wish, forecast
    from qpalette.report.plan_facts import cache_fact, cache_of

    plan = Wish.of(model, out, budget, text=text, recipe=recipe, **options).draft()
    cache = cache_of(plan)
    steps = forecast(model, text, plan.plan, recipe, options["device"])
    total = sum(step.seconds for step in steps)
    rate = float(plan.planned.average_bits)
    if as_json:
        steps_json = [vars(step) for step in steps]
        told = {"dry_run": True, "bits_per_weight": rate, "steps": steps_json, "seconds": total, "cache": cache}
        return print_json(told)
    rows = [(step.name, step.what, _duration(step.seconds)) for step in steps]
    print_table(f"{model}: nothing is written", ("step", "on", "about"), rows)
    facts = {"bits per weight": f"{rate:.4f}, everything counted", "time needed": f"about {_duration(total)}"}
    if plan.disk_bytes is not None and budget.size is not None:
        facts["size"] = f"at most {size(plan.disk_bytes)}"
    if cache is not None:
        facts["cache"] = f"planned, too; if every number mattered alike: {cache_fact(cache, plan.planned.choice.loss)}"
    print_facts(str(out), facts)


def _write_page(file: Path, model: str, found: Compressed, budget: Budget) -> None:
    from qpalette.report.plan_page import plan_page
    from qpalette.storage import open_checkpoint

    command = shlex.join(["qpalette", *sys.argv[1:]])
    write_text(file, plan_page(found.planned, str(budget), command, model, open_checkpoint(model)))


def _show(found: Compressed, budget: Budget, as_json: bool) -> None:
    from qpalette.cli.plan import show_plan
    from qpalette.cli.tune import show_tuned

    tuned = found.tuned
    predicted = found.planned.planned.choice.loss
    if as_json:
        print_json(
            {
                "output": tuned.output,
                "bits_per_weight": tuned.bits_after,
                "predicted_kl": predicted,
                "kl_before": tuned.tuned.kl_before,
                "kl_after": tuned.tuned.kl_after,
                "steps": tuned.tuned.steps,
                "budget": str(budget),
            }
        )
        return
    show_plan(found.planned, str(budget))
    show_tuned(tuned, as_json)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(1, round(seconds))} s"
