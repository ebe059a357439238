"""qpalette tune: the same codes, with better scales, diagonals and norms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpalette.cli.output import StageBars, print_facts, print_json, quiet_transformers
from qpalette.core.text import count, size

if TYPE_CHECKING:
    from qpalette.tuning import Forecast, TuneReport


def tune(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The quantized directory.")],
    reference: Annotated[
        str, typer.Option("--reference", metavar="MODEL", help="The original: the model that OUT was made from.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="A UTF-8 text file, or sampled tokens.  [default: the original writes it]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="OUT2", help="The directory to write.  [default: OUT itself]")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="At most N steps.")] = 150,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Windows in a step; one is in memory.")] = 4,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", metavar="R", help="At the start; it falls to zero by a cosine.")
    ] = 1e-3,
    window: Annotated[int, typer.Option("--window", metavar="N", help="Windows of N tokens.")] = 2048,
    windows: Annotated[
        int | None,
        typer.Option("--windows", metavar="N", help="Tune on the first N windows.  [default: all not held out; 24]"),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(
            "--held-out", metavar="N", help="At most N windows from all of the text decide when to stop, what is kept."
        ),
    ] = 8,
    every: Annotated[int, typer.Option("--every", metavar="N", help="Look at them after every N steps.")] = 10,
    patience: Annotated[
        int, typer.Option("--patience", metavar="N", help="Stop after N looks in a row without gain.")
    ] = 4,
    save_every: Annotated[int, typer.Option("--save-every", metavar="N", help="Keep the state every N steps.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the windows' order, and of sampled text.")] = 0,
    keep_size: Annotated[
        bool, typer.Option("--keep-size", help="Signs stay signs: no float16 per input takes their place.")
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute/--no-recompute", help="Compute activations twice: slower, less memory.")
    ] = True,
    cache: Annotated[
        bool, typer.Option("--cache", help="The original reads all windows first: one model in memory at a time.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16: of activations.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="Such as cpu or cuda.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and how long.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT2 if it is a quantized model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Tune row scales, input diagonals, norms and biases by KL to the original; codes and format stay.

    Interrupted, the same command goes on where it stopped.

    Example: [bold]qpalette tune OUT --reference MODEL --text wiki.train.raw[/]
    """
    from qpalette.tuning import Tuning
    from qpalette.tuning import tune as run

    tuning = Tuning(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        window=window,
        windows=windows,
        held_out=held_out,
        every=every,
        patience=patience,
        save_every=save_every,
        seed=seed,
        keep_size=keep_size,
        recompute=recompute,
        cache=cache,
    )
    options: dict[str, Any] = {"tuning": tuning, "device": device, "dtype": _dtype(dtype)}
    if dry_run:
        from qpalette.tuning import forecast

        return _show_forecast(model, forecast(model, reference, text, **options), as_json)
    quiet_transformers()
    with StageBars() as watcher:
        report = run(model, reference, text, out, **options, overwrite=overwrite, watcher=watcher)
    show_tuned(report, as_json)


def _dtype(name: str) -> Any:
    import torch

    from qpalette.core.errors import InputError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise InputError(f"'{name}' is no type to tune in: choose {' or '.join(known)}")
    return known[name]


def show_tuned(report: TuneReport, as_json: bool) -> None:
    """What `tune` has done. JSON keys that stay: output, kl_before, kl_after, steps, bits_per_weight."""
    tuned = report.tuned
    if as_json:
        print_json(
            {
                "output": report.output,
                "kl_before": tuned.kl_before,
                "kl_after": tuned.kl_after,
                "steps": tuned.steps,
                "steps_run": report.steps_run,
                "held_out": [{"step": step, "kl": kl} for step, kl in report.looks],
                "tokens": tuned.tokens,
                "held_out_tokens": tuned.held_out_tokens,
                "numbers": report.numbers,
                "left_alone": report.left_alone,
                "bits_per_weight_before": report.bits_before,
                "bits_per_weight": report.bits_after,
            }
        )
        return
    before, after = float(report.bits_before), float(report.bits_after)
    gain = "nothing gained: every value is as it was" if tuned.steps == 0 else f"that of step {tuned.steps} is kept"
    left = f"; {report.left_alone} vectors that transformers makes anew are left alone" if report.left_alone else ""
    print_facts(
        str(report.output),
        {
            "held-out KL": f"{tuned.kl_before:.4f} before, {tuned.kl_after:.4f} after, nats per token",
            "steps": f"{report.steps_run}; {gain}",
            "on": f"{tuned.tokens} tokens; {tuned.held_out_tokens} held out",
            "tuned": f"{count(report.numbers)} numbers: scales, diagonals, norms and biases, of packed embeddings and "
            f"experts too{left}",
            "bits per weight": f"{before:.4f} before, {after:.4f} after, everything counted",
        },
    )


def _show_forecast(model: str, found: Forecast, as_json: bool) -> None:
    if as_json:
        return print_json({"dry_run": True, **vars(found)})
    print_facts(
        f"{model}: nothing is written",
        {
            "tuned": f"scales and diagonals of {found.linears} linears, packed embeddings and experts too; up to "
            f"{found.vectors} norms and biases",
            "steps": f"at most {found.steps}, of {found.tokens_per_step} tokens",
            "bits per weight": f"{float(found.bits_before):.4f} before, {float(found.bits_after):.4f} after",
            "memory needed": f"about {size(found.memory_bytes)}",
            "free disk needed": size(found.disk_bytes),
            "time needed": f"about {found.seconds:.0f} s, if no step is spared",
        },
    )
