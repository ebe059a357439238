"""qpalette calibrate: what the linears of a model read, measured on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpalette.cli.output import print_facts, print_json, quiet_transformers, step_bar, token_bar


def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a .gguf file or a Hub id.")],
    hessians: Annotated[Path, typer.Argument(metavar="HESSIANS", help="The directory to fill.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="A UTF-8 text file, or sampled tokens.  [default: the model writes it]"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Read the first N tokens.")] = 65_536,
    window: Annotated[int, typer.Option("--window", metavar="N", help="In windows of N tokens.")] = 2048,
    memory: Annotated[
        float, typer.Option("--memory", metavar="GIB", help="For Hessians; with less, the text is read more often.")
    ] = 2,
    device: Annotated[str, typer.Option("--device", help="Where to run the model, such as cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure Hessians for quantize --hessians. Interrupted, the same command goes on where it stopped.

    Example: [bold]qpalette calibrate MODEL HESSIANS --text wiki.train.raw[/]
    """
    from qpalette.api import calibrate as run
    from qpalette.core.errors import InputError

    if not 0 < memory < 1 << 20:
        raise InputError(f"memory must be a positive number of GiB, got {memory:g}")
    quiet_transformers()
    with token_bar("writing text") as writing, step_bar("windows") as bar:
        found = run(
            model,
            hessians,
            text,
            tokens=tokens,
            window=window,
            device=device,
            memory_budget_bytes=int(memory * (1 << 30)),
            progress=bar.show,
            writing=writing.show,
        )
    if as_json:
        print_json(found)
    else:
        facts = {"tokens": f"{found.tokens}, in windows of {found.window}", "text": f"SHA-256 {found.text_sha256}"}
        print_facts(str(hessians), facts)
