"""qpalette eval: what quantization did to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpalette.cli.output import print_facts, print_json, print_note, quiet_transformers, step_bar, token_bar
from qpalette.cli.prefill import Prefill, use_prefill

if TYPE_CHECKING:
    from qpalette.evaluate import Evaluation
    from qpalette.evaluate.cache import CacheEvaluation


Model = Annotated[str, typer.Argument(metavar="OUT", help="The quantized directory (or any other model).")]
Reference = Annotated[
    str | None,
    typer.Option("--reference", metavar="MODEL", help="The original: KL and top-1 are measured against it."),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text", metavar="FILE", help="A UTF-8 text file, or sampled tokens.  [default: the reference writes it]"
    ),
]
Windows = Annotated[
    int | None,
    typer.Option("--windows", metavar="N", help="Use the first N windows of 2048 tokens.  [default: all]"),
]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="T,T", help="Score tasks of lm-eval instead: names, or task files (.yaml)."),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="SPEC",
        help="Read every token through this key-value cache: vq-3, vq-3/vq-2.5, white:nuq-4, sinks=N and window=N "
        "after commas, a plan file; or fp8, q8_0, q4_0, nvfp4, kivi-2, turboquant-3, exl3-3.  Without --reference, "
        "against the same model with its own cache.",
    ),
]
CacheText = Annotated[
    Path | None,
    typer.Option(
        "--cache-text",
        metavar="FILE",
        help="Calibrate --cache on this text.  [default: the model's own, or what it writes]",
    ),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", metavar="N", help="With --cache: windows of N tokens. Repeatable.  [default: 2048]"),
]
Device = Annotated[str, typer.Option("--device", help="Such as cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]


def evaluate(
    model: Model,
    reference: Reference = None,
    text: TextFile = None,
    windows: Windows = None,
    tasks: Tasks = None,
    cache: Cache = None,
    cache_text: CacheText = None,
    length: Lengths = None,
    prefill: Prefill = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, KL divergence from the original and top-1 agreement, or score tasks.

    Example: [bold]qpalette eval OUT --reference MODEL --text wiki.test.raw --windows 16[/]
    """
    from qpalette.evaluate import evaluate as measure
    from qpalette.evaluate.text_source import check_text
    from qpalette.evaluate.windows import WINDOW, check_limit
    from qpalette.runtime import prefill_road
    from qpalette.runtime.device import parse_device

    where = parse_device(device)
    use_prefill(prefill)
    if tasks is not None:
        from qpalette.cli.tasks import score_tasks

        return score_tasks(model, reference, tasks, as_json, where)
    check_limit(windows)
    if cache is None and (cache_text is not None or length):
        raise typer.BadParameter("--cache-text and --length are for --cache")
    check_text(text, model if reference is None else reference)  # a wrong file is told before minutes of loading
    if cache is not None:
        return _through_cache(model, reference, cache, text, cache_text, windows, length or [WINDOW], where, as_json)
    if text is None and reference is not None:
        print_note("no --text: the reference writes it first")
    quiet_transformers()
    with token_bar("writing text") as writing, step_bar("windows") as bar:
        result = measure(model, reference, text, windows, where, progress=bar.show, writing=writing.show)
    if as_json:
        print_json({**vars(result), "prefill": prefill_road()})
    else:
        print_facts(model, _facts(result))


def _through_cache(
    model: str,
    reference: str | None,
    cache: str,
    text: Path | None,
    cache_text: Path | None,
    windows: int | None,
    lengths: list[int],
    device: Any,
    as_json: bool,
) -> None:
    from qpalette.evaluate.cache import check_cache, evaluate_through_cache
    from qpalette.evaluate.text_source import check_text

    check_cache(cache)
    check_text(cache_text, model)
    quiet_transformers()
    with token_bar("writing text") as writing, step_bar("windows") as bar:
        options: dict[str, Any] = {"reference": reference, "cache_text": cache_text, "device": device}
        results = evaluate_through_cache(
            model, cache, text, windows, lengths, **options, progress=bar.show, writing=writing.show
        )
    if as_json:
        return print_json({**vars(results[0]), "lengths": results})
    for result in results:
        print_facts(f"{model}, windows of {result.context} tokens", _cache_facts(result) | _facts(result))


def _cache_facts(result: CacheEvaluation) -> dict[str, str]:
    return {
        "cache": f"{result.cache}, {result.cache_bits:.4f} bits per number; "
        f"{result.cache_bits_with_exact:.4f} with the exact tokens of a window",
    }


def _predicted(result: Evaluation) -> str:
    """What the plan promised, beside what was measured."""
    if result.predicted_kl is None or not result.kl:
        return ""
    return f"{result.predicted_kl:.4f} by the plan; measured is {result.kl / result.predicted_kl:.2f} times as much"


def _facts(result: Evaluation) -> dict[str, str]:
    """Only what was measured."""
    from qpalette.runtime import INT8, prefill_road

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
        "packed matrices": "multiplied in int8" if prefill_road() == INT8 else "",
        "on": f"{result.windows} windows, {result.tokens} predictions",
    }
    return {name: value for name, value in facts.items() if value}
