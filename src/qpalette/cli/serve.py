"""qpalette serve: an OpenAI-compatible server."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from qpalette.cli.output import CACHE_HELP, print_note
from qpalette.cli.prefill import Prefill, use_prefill

LOCAL = "127.0.0.1"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="OUT", help="The quantized directory (or any other model).")],
    engine: Annotated[str, typer.Option("--engine", help="transformers or vllm.")] = "transformers",
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 lets the network in.")] = LOCAL,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="QPALETTE_API_KEY", help="Answer only who knows it."),
    ] = None,
    cache: Annotated[str | None, typer.Option("--cache", metavar="SPEC", help=CACHE_HELP)] = None,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, help="With transformers: how many requests are answered together, at most."),
    ] = 8,
    compile: Annotated[
        str,
        typer.Option(
            "--compile",
            help="With transformers on a GPU, compile the steps too: never, background (answers come meanwhile) or "
            "now, before the first token.",
        ),
    ] = "background",
    prefill: Prefill = None,
) -> None:
    """Serve /v1/chat/completions, streaming too, and /v1/models. Options after -- are the engine's own.

    Example: [bold]qpalette serve OUT --port 8001 -- --device cuda[/]
    """
    from qpalette.core.errors import UnsupportedError
    from qpalette.evaluate.loading import directory_for
    from qpalette.generation import check_mode
    from qpalette.integrations import serving
    from qpalette.kvcache import parse_cache

    check_mode(compile)
    use_prefill(prefill)
    if cache not in (None, "none"):
        parse_cache(str(cache))
        if engine == "vllm" or "--continuous-batching" in context.args:
            raise UnsupportedError("--cache is for transformers' generate: vLLM and continuous batching have their own")
    serving.check_engine(engine)
    serving.check_port(host, port)
    directory = str(directory_for(model))
    if serving.is_public(host):
        print_note(_exposed(host, api_key))
    place = f"[{host}]" if ":" in host else host
    print_note(f"{directory} at http://{place}:{port}/v1, {engine}; Ctrl-C stops")
    if engine == "vllm":
        serving.serve_vllm(directory, host, port, context.args, api_key)
    else:
        prepare = partial(_prepared, compile, cache, batch)
        serving.serve_transformers(directory, host, port, context.args, prepare, api_key)


def _prepared(compile: str, cache: str | None, slots: int, model: Any) -> Any:
    """The model as `transformers serve` has loaded it, with a `generate` of ours."""
    from qpalette.api import cache_maker
    from qpalette.generation import fast

    model.generation_config.update(num_beams=1, num_return_sequences=1)  # one answer, told as it is written

    return fast(model, compile, cache_maker(model, None, cache), slots)


def _exposed(host: str, key: str | None) -> str:
    if key is None:
        return f"warning: whoever reaches {host} may use the model; --api-key KEY asks for a key"
    return f"warning: what goes to and from {host}, the key too, can be read on its way: put TLS before it"
