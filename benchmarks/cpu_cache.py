"""A token step on the CPU over caches of codes, beside one over keys and values as they are.

    python benchmarks/cpu_cache.py MODEL [--cache white:vq-3 --cache white:nuq-4] [--context 32 --context 1024]

Requests over each cache take turns in one process, on one thread; what counts is the lower quartile of its processor
time between tokens, as a streamer sees it. A calibrated transform (vq-3 without "white:") costs minutes beforehand.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cpu_step import SKIPPED, quartile, times
from report import commit, processor, report

from qpalette.api import cache_maker
from qpalette.core.environment import CPU_BYTES
from qpalette.evaluate import load_model
from qpalette.generation import Generate
from qpalette.generation.native import ProgramCapture

PLAIN = "none"


def main(
    model: str,
    cache: Annotated[list[str] | None, typer.Option()] = None,
    context: Annotated[list[int] | None, typer.Option()] = None,
    dtype: str = "bfloat16",
    steps: int = 40,
    rounds: int = 4,
    name: str = "cpu_cache",
) -> None:
    os.environ.setdefault(CPU_BYTES, "1")  # as the commands do
    torch.set_num_threads(1)
    loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
    specs = [PLAIN, *(cache or ["white:nuq-4", "white:vq-3", "white:vq4-2"])]
    makers = [cache_maker(loaded, tokenizer, spec) for spec in specs]
    captures = [ProgramCapture() for _ in specs]
    runners = [Generate(loaded, "never", *each) for each in zip(captures, makers, strict=True)]
    rows = []
    for tokens in context or [32, 1024]:
        rows.append({"context": tokens, "type": dtype} | measured(specs, runners, captures, tokens, steps, rounds))
        gc.collect()
    report(name, processor(), rows, commit=commit(), model=Path(model).name, steps=steps, rounds=rounds)


def measured(
    specs: list[str],
    runners: list[Generate],
    captures: list[ProgramCapture],
    context: int,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """Milliseconds a token over each cache, and how often that of keys and values as they are."""
    prompt = torch.randint(3, runners[0].model.config.vocab_size, (1, context))
    for run, capture in zip(runners, captures, strict=True):
        times(run, prompt, SKIPPED)
        capture.wait()
    found: list[list[float]] = [[] for _ in runners]
    for _ in range(rounds):
        for run, each in zip(runners, found, strict=True):
            each += times(run, prompt, steps)
    milliseconds = dict(zip(specs, map(quartile, found), strict=True))
    ratios = {f"{spec} over {PLAIN}": milliseconds[spec] / milliseconds[PLAIN] for spec in specs[1:]}
    return {f"{spec} ms/token": each for spec, each in milliseconds.items()} | ratios


if __name__ == "__main__":
    typer.run(main)
