"""qpalette calibrate: what the linears of a model read and how their outputs matter, measured on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpalette.cli.output import print_facts, print_json, quiet_transformers, step_bar, token_bar

if TYPE_CHECKING:
    from qpalette.calibration.hessians import Calibration


def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a .gguf file or a Hub id.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to fill.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="A UTF-8 text file, or sampled tokens.  [default: the model writes it]"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Read the first N tokens.")] = 65_536,
    window: Annotated[int, typer.Option("--window", metavar="N", help="In windows of N tokens.")] = 2048,
    one_sided: Annotated[
        bool, typer.Option("--one-sided", help="Inputs alone: forward passes, a third of the time, less gain.")
    ] = False,
    draws: Annotated[
        int, typer.Option("--draws", metavar="N", help="Backward passes of a window: that many labels for each token.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the labels drawn from the model's predictions.")] = 0,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            metavar="GIB",
            help="For sums; with less, the text is read more often.  [default: 4, or a quarter of what a GPU has left]",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the model: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="Where to run the model, such as cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure what quantize --calibration needs. Interrupted, the same command goes on where it stopped.

    Example: [bold]qpalette calibrate MODEL DIR --text wiki.train.raw[/]
    """
    from qpalette.api import calibrate as run
    from qpalette.cli.answer import parse_dtype
    from qpalette.core.errors import InputError

    if memory is not None and not 0 < memory < 1 << 20:
        raise InputError(f"memory must be a positive number of GiB, got {memory:g}")
    quiet_transformers()
    with token_bar("writing text") as writing, step_bar("windows") as bar:
        found = run(
            model,
            directory,
            text,
            tokens=tokens,
            window=window,
            device=device,
            memory_budget_bytes=None if memory is None else int(memory * (1 << 30)),
            dtype=parse_dtype(dtype),
            one_sided=one_sided,
            seed=seed,
            draws=draws,
            progress=bar.show,
            writing=writing.show,
        )
    _show(found, directory, as_json)


def _show(found: Calibration, directory: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from qpalette.calibration.hessians import HessianStore

    experts = sorted(HessianStore.open(directory).expert_tokens.values())
    if as_json:
        print_json(asdict(found) | {"expert_tokens": experts})
    else:
        facts = {
            "sides": "inputs and outputs" if found.sides == 2 else "inputs",
            "tokens": f"{found.tokens}, in windows of {found.window}",
            "text": f"SHA-256 {found.text_sha256}",
        }
        if experts:
            middle = experts[len(experts) // 2]
            facts["tokens per expert"] = f"{experts[0]} to {experts[-1]}, median {middle}"
        print_facts(str(directory), facts)
