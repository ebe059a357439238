"""qpalette generate: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from qpalette.cli.output import CACHE_HELP, print_json, print_note, quiet_transformers
from qpalette.cli.prefill import Prefill, use_prefill


def generate(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The quantized directory (or any other model).")],
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Stop after N tokens.")] = 64,
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
            help="On a GPU, compile the steps too: never, background (tokens come meanwhile) or now, before the first "
            "token.",
        ),
    ] = "never",
    prefill: Prefill = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling, when the temperature is above 0.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object at the end instead of streaming.")
    ] = False,
) -> None:
    """Answer a prompt; the text streams to stdout, the speed goes to stderr.

    Example: [bold]qpalette generate OUT "Why is the sky blue?" --max-new-tokens 100[/]
    """
    from qpalette.cli.answer import check_sampling, open_model, stream_answer
    from qpalette.core.errors import InputError

    check_sampling(max_new_tokens, temperature)
    if not prompt.strip():
        raise InputError("the prompt is empty")
    use_prefill(prefill)
    quiet_transformers()
    import torch

    loaded, tokenizer = open_model(model, engine, device, dtype, compile, cache)
    torch.manual_seed(seed)
    tokens = _tokens(tokenizer, prompt, raw)
    answer = stream_answer(loaded, tokenizer, tokens, max_new_tokens, temperature, _silent if as_json else _to_stdout)
    if as_json:
        facts = {"text": answer.text, "prompt_tokens": answer.prompt_tokens, "tokens": answer.tokens}
        facts |= {"prompt_seconds": answer.prompt_seconds, "seconds": answer.seconds}
        print_json(facts | {"tokens_per_second": answer.tokens_per_second})
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    print_note(answer.describe())


def _tokens(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """int64 [1, tokens]."""
    from qpalette.cli.answer import prompt_of

    if raw or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    return prompt_of(tokenizer, [{"role": "user", "content": prompt}])


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _silent(text: str) -> None:
    """The whole text comes in the JSON."""
