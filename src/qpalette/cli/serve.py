"""qpalette serve: an OpenAI-compatible server."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from qpalette.cli.output import print_note

LOCAL = "127.0.0.1"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="OUT", help="The quantized directory (or any other model).")],
    engine: Annotated[str, typer.Option("--engine", help="transformers or vllm.")] = "transformers",
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 lets the network in.")] = LOCAL,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port to listen on.")] = 8000,
    compile: Annotated[
        str,
        typer.Option(
            "--compile",
            help="With transformers on a GPU, compile the steps too: never, background (answers come meanwhile) or "
            "now, before the first token.",
        ),
    ] = "background",
) -> None:
    """Serve /v1/chat/completions, streaming too, and /v1/models. Options after -- are the engine's own.

    Example: [bold]qpalette serve OUT --port 8001 -- --device cuda[/]
    """
    from qpalette.evaluate.loading import directory_for
    from qpalette.generation import check_mode, fast
    from qpalette.integrations import serving

    check_mode(compile)
    serving.check_engine(engine)
    serving.check_port(host, port)
    directory = str(directory_for(model))
    print_note(f"{directory} at http://{host}:{port}/v1, {engine}; Ctrl-C stops")
    if engine == "vllm":
        serving.serve_vllm(directory, host, port, context.args)
    else:
        serving.serve_transformers(directory, host, port, context.args, partial(fast, compile=compile))
