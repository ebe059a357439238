"""qpalette eval: what quantization did to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpalette.cli.output import print_facts, print_json, print_note, quiet_transformers, step_bar, token_bar

if TYPE_CHECKING:
    from qpalette.evaluate import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The quantized directory (or any other model).")],
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="The original: KL and top-1 are measured against it."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="A UTF-8 text file, or sampled tokens.  [default: the reference writes it]"
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option("--windows", metavar="N", help="Use the first N windows of 2048 tokens.  [default: all]"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="T,T", help="Score tasks of lm-eval instead: names, or task files (.yaml)."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Such as cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure perplexity, KL divergence from the original and top-1 agreement, or score tasks.

    Example: [bold]qpalette eval OUT --reference MODEL --text wiki.test.raw --windows 16[/]
    """
    from qpalette.evaluate import evaluate as measure
    from qpalette.evaluate.text_source import check_text
    from qpalette.evaluate.windows import check_limit
    from qpalette.runtime.device import parse_device

    where = parse_device(device)
    if tasks is not None:
        from qpalette.cli.tasks import score_tasks

        return score_tasks(model, reference, tasks, as_json, where)
    check_limit(windows)
    check_text(text, model if reference is None else reference)  # a wrong file is told before minutes of loading
    if text is None and reference is not None:
        print_note("no --text: the reference writes it first")
    quiet_transformers()
    with token_bar("writing text") as writing, step_bar("windows") as bar:
        result = measure(model, reference, text, windows, where, progress=bar.show, writing=writing.show)
    if as_json:
        print_json(result)
    else:
        print_facts(model, _facts(result))


def _predicted(result: Evaluation) -> str:
    """What the plan promised, beside what was measured."""
    if result.predicted_kl is None or not result.kl:
        return ""
    return f"{result.predicted_kl:.4f} by the plan; measured is {result.kl / result.predicted_kl:.2f} times as much"


def _facts(result: Evaluation) -> dict[str, str]:
    """Only what was measured."""
    error = "" if result.kl_stderr is None else f" +- {result.kl_stderr:.4f}"
    facts = {
        "perplexity": f"{result.perplexity:.3f}",
        "reference perplexity": "" if result.reference_perplexity is None else f"{result.reference_perplexity:.3f}",
        "KL": "" if result.kl is None else f"{result.kl:.4f}{error} nats per token",
        "KL of a prediction": ""
        if result.kl_median is None or result.kl_999 is None
        else f"median {result.kl_median:.4f}, 99.9 % below {result.kl_999:.4f}",
        "predicted KL": _predicted(result),
        "top-1 agreement": "" if result.top1 is None else f"{100 * result.top1:.1f} %",
        "bits per weight": ""
        if result.bits_per_weight is None
        else f"{result.bits_per_weight:.4f}, everything counted",
        "on": f"{result.windows} windows, {result.tokens} predictions",
    }
    return {name: value for name, value in facts.items() if value}
