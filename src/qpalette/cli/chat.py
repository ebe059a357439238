"""qpalette chat: a conversation."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from qpalette.cli.output import CACHE_HELP, print_error, print_note, quiet_transformers
from qpalette.cli.prefill import Prefill, use_prefill

HELP = "/reset forgets the conversation, /exit or end of input leaves, Ctrl-C stops an answer"


def chat(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The quantized directory (or any other model).")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Longest answer, in tokens.")
    ] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0 always takes the most likely token.")] = 0.0,
    engine: Annotated[
        str, typer.Option("--engine", help="transformers; other engines have `qpalette serve`.")
    ] = "transformers",
    device: Annotated[str, typer.Option("--device", help="Such as cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="To compute in.  [default: float16 on a GPU, float32 on a CPU]")
    ] = None,
    cache: Annotated[str | None, typer.Option("--cache", metavar="SPEC", help=CACHE_HELP)] = None,
    compile: Annotated[
        str,
        typer.Option(
            "--compile",
            help="On a GPU, compile the steps too: never, background (answers come meanwhile) or now, before the first "
            "token.",
        ),
    ] = "background",
    prefill: Prefill = None,
) -> None:
    """Talk to a model. It remembers the conversation until /reset; /exit leaves.

    Example: [bold]qpalette chat OUT --temperature 0.7[/]
    """
    from qpalette.cli.answer import check_sampling, open_model
    from qpalette.core.errors import InputError

    check_sampling(max_new_tokens, temperature)
    use_prefill(prefill)
    quiet_transformers()

    loaded, tokenizer = open_model(model, engine, device, dtype, compile, cache)
    if tokenizer.chat_template is None:
        raise InputError(f"{model} has no chat template; use `qpalette generate`")
    with suppress(ImportError):  # where it exists, it gives `input` line editing and a history
        importlib.import_module("readline")
    print_note(HELP)
    history: list[dict[str, str]] = []
    while (line := _read_line()) is not None:
        if line == "/reset":
            history = []
            print_note("forgotten")
        elif line.startswith("/"):
            print_error(f"unknown command {line}; {HELP}")
        elif line:
            history = _turn(loaded, tokenizer, history, line, max_new_tokens, temperature)


def _read_line() -> str | None:
    """What the user typed, without spaces around it; None to leave."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        sys.stdout.write("\n")
        return None
    return None if line == "/exit" else line


def _turn(
    model: Any,
    tokenizer: Any,
    history: list[dict[str, str]],
    line: str,
    max_new_tokens: int,
    temperature: float,
) -> list[dict[str, str]]:
    """Answer `line`; the history with this turn, or without it when it failed or was stopped."""
    from qpalette.cli.answer import prompt_of, stream_answer
    from qpalette.core.errors import InputError

    asked = [*history, {"role": "user", "content": line}]
    try:
        answer = stream_answer(model, tokenizer, prompt_of(tokenizer, asked), max_new_tokens, temperature, _write)
    except KeyboardInterrupt:
        print_note("\nstopped; this turn is forgotten")
        return history
    except InputError as error:
        print_error(f"{error}; /reset starts anew")
        return history
    _write("\n")
    print_note(answer.describe())
    return [*asked, {"role": "assistant", "content": answer.text}]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
