"""qpalette sensitivity: how much the loss rises with the distortion of each linear."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpalette.cli.output import (
    print_facts,
    print_json,
    print_note,
    print_table,
    quiet_transformers,
    step_bar,
    token_bar,
    write_text,
)

if TYPE_CHECKING:
    from qpalette.plan import Sensitivities


def sensitivity(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a .gguf file or a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.json", help="The file to write.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="A UTF-8 text file, or sampled tokens.  [default: the model writes it]"
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="DIR",
            help="Of calibrated rounding's error, on the text that qpalette calibrate set aside; kept in DIR, too.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="fisher: one backward pass; perturbation: noise into one linear after the other."
        ),
    ] = "fisher",
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", help="Read N tokens.  [default: 16384, with perturbation 2048]"),
    ] = None,
    window: Annotated[int, typer.Option("--window", metavar="N", help="In windows of N tokens.")] = 2048,
    distortion: Annotated[
        float, typer.Option("--distortion", metavar="D", help="Of the noise that perturbation adds.")
    ] = 0.01,
    cache: Annotated[
        bool, typer.Option("--cache", help="Of keys and values of each layer, too: plan --memory then plans the cache.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of labels, noise and sampled text.")] = 0,
    device: Annotated[str, typer.Option("--device", help="Where to run the model, such as cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the file's content.")] = False,
) -> None:
    """Measure how much each linear's distortion costs, for plan and quantize. Interrupted, the same command goes on.

    Example: [bold]qpalette sensitivity MODEL sensitivity.json --text wiki.train.raw[/]
    """
    from qpalette.api import calibrated_sensitivities, measure_sensitivities

    if calibration is not None:
        if text is not None or cache:
            raise typer.BadParameter("--calibration has a text of its own: give it without --text and --cache")
        quiet_transformers()
        with step_bar("calibrated") as bar:
            found = calibrated_sensitivities(model, calibration, seed=seed, device=device, progress=bar.show)
        write_text(out, found.to_json())
        _show(found, out, as_json)
        return
    if text is None:
        print_note("no --text: the model writes it first")
    quiet_transformers()
    with token_bar("writing text") as writing, step_bar(method) as bar:
        found = measure_sensitivities(
            model,
            out,
            text,
            method=method,
            tokens=tokens,
            window=window,
            distortion=distortion,
            cache=cache,
            seed=seed,
            device=device,
            progress=bar.show,
            writing=writing.show,
        )
    _show(found, out, as_json)


def _show(found: Sensitivities, out: Path, as_json: bool) -> None:
    if as_json:
        streams = {"streams": {stream.name: stream.sensitivity for stream in found.streams}} if found.streams else {}
        print_json({"provenance": dict(found.provenance), "sensitivities": found.values} | streams)
        return
    from qpalette.models.kinds import linear_kind

    kinds: dict[str, list[float]] = {}
    for linear in found.linears:
        kinds.setdefault(linear_kind(linear.name), []).append(linear.sensitivity)
    for stream in found.streams:
        kinds.setdefault(f"cache: {stream.kind}", []).append(stream.sensitivity)
    rows = [
        (kind, str(len(values)), f"{sum(values):.4g}", f"{min(values):.4g}", f"{max(values):.4g}")
        for kind, values in kinds.items()
    ]
    caption = "rise of KL, nats per token, for each unit of distortion (mean squared error / mean square)"
    print_table("Sensitivities", ("linear", "times", "all together", "least", "most"), rows, caption=caption)
    print_facts(
        str(out), {key: value for key, value in found.provenance.items() if key in ("method", "text", "tokens")}
    )
