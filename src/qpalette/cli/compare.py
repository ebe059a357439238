"""qpalette compare: several quantized models beside each other, whoever made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpalette.cli.output import print_error, print_json, print_note, print_table, quiet_transformers, step_bar
from qpalette.core.text import size

if TYPE_CHECKING:
    from qpalette.evaluate.compare import Compared

PROMPT, NEW_TOKENS = 64, 48  # of the requests that are timed


def compare(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="What the models were made from.")],
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Quantized directories, GGUF files, other checkpoints.")
    ],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="A UTF-8 text file, or sampled tokens.")],
    windows: Annotated[
        int | None,
        typer.Option("--windows", metavar="N", help="Use the first N windows of 2048 tokens.  [default: all]"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Such as cpu or cuda.")] = "cpu",
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Do not time decoding.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Bytes against KL, as a .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure several models against one original: bytes, KL divergence, top-1, perplexity and speed.

    The original runs once, and one model is in memory at a time. One that fails has its reason in its row.

    Example: [bold]qpalette compare MODEL OUT model.Q3_K_M.gguf --text wiki.test.raw --windows 16[/]
    """
    from qpalette.evaluate.compare import compare as measure
    from qpalette.runtime.device import device_name, parse_device

    where = parse_device(device)
    if plot is not None:
        from qpalette.report.pictures import check_picture

        check_picture(plot)
    quiet_transformers()
    with step_bar("windows") as bar:
        rows = measure(original, models, text, windows, where, progress=bar.show)
    if not no_speed:
        with step_bar("speeds") as bar:
            rows = [_timed(row, where, bar.show, done, len(rows)) for done, row in enumerate(rows, start=1)]
    if plot is not None:
        from qpalette.report.compare_plot import draw_comparison

        draw_comparison(rows, plot)
    if as_json:
        facts = {"text": text, "windows": windows, "device": device_name(where), "date": str(date.today())}
        print_json({**facts, "models": rows})
    else:
        _print(rows)
    for row in rows:
        if row.failure is not None:
            print_error(f"{row.model}: {row.failure}")
    if any(row.failure is not None for row in rows):
        raise typer.Exit(1)


def _timed(row: Compared, device: Any, told: Callable[[int, int], None], done: int, total: int) -> Compared:
    """With the speed of what `qpalette generate` runs; a failure to time it leaves what was measured."""
    import torch

    from qpalette.bench import GENERATE, from_directory, measure
    from qpalette.evaluate.compare import reason

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if row.failure is None:
        try:
            candidate = from_directory(row.model, row.model, dtype, device, None)
            ((speed, _),) = measure([candidate], [1], [PROMPT], NEW_TOKENS, GENERATE)
            row = replace(row, tokens_per_second=speed.tokens_per_second)
        except Exception as error:  # whatever a model's code raises: the others go on
            row = replace(row, failure=f"its speed could not be measured ({reason(error)})")
    told(done, total)
    return row


def _print(rows: Sequence[Compared]) -> None:
    from qpalette.evaluate.compare import AS_STORED

    columns: dict[str, Callable[[Compared], str]] = {
        "model": lambda row: row.model,
        "format": lambda row: row.format or "failed",
        "size": lambda row: "" if row.file_bytes is None else size(row.file_bytes),
        "bits/weight": lambda row: _shown(row.bits_per_weight, "{:.3f}"),
        "KL": lambda row: _shown(row.kl, "{:.4f}") + _shown(row.kl_stderr, " +- {:.4f}"),
        "median": lambda row: _shown(row.kl_median, "{:.4f}"),
        "99.9 %": lambda row: _shown(row.kl_999, "{:.3f}"),
        "top-1": lambda row: _shown(row.top1, "{:.1%}"),
        "perplexity": lambda row: _shown(row.perplexity, "{:.3f}"),
        "tokens/s": lambda row: _shown(row.tokens_per_second, "{:.1f}"),
    }
    rows_shown = [tuple(cell(row) for cell in columns.values()) for row in rows]
    caption = "bits/weight: all bytes of the weight files over the original's weights; KL: nats per token"
    print_table(f"Against {rows[0].model}", tuple(columns), rows_shown, caption=caption)
    decoded = [row.model for row in rows if row.failure is None and row.format not in AS_STORED]
    if decoded and any(row.tokens_per_second is not None for row in rows):
        print_note(f"{', '.join(decoded)}: decoded once, and run here in plain weights; the tokens/s are of those")


def _shown(value: float | None, template: str) -> str:
    return "" if value is None else template.format(value)
