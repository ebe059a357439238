"""Seconds before the first token of a model of many rates on the processor: first start, and with its kernels on disk.

    python benchmarks/first_token.py
    python benchmarks/first_token.py --model ARTIFACT

The model is a chain of one small linear for each of 27 quantizers, every fourth of the palette: what counts is what is
compiled and loaded, not the products. Each start is a process of its own; it reads a prompt of 32 tokens (weights are
decoded whole) and makes two tokens (products of one vector). With --model it is `qpalette generate` on a model that is
there, as a user starts it: seconds until the first of the answer is printed, Python and torch included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import commit, processor, report

FEATURES, PROMPT, EVERY = 256, 32, 4


def start() -> dict[str, float]:
    """One start, in this process: seconds of each part, the import of torch (by `report`) apart."""
    marks = [("", time.perf_counter())]
    from qpalette.codes import full_palette
    from qpalette.rotate import pack_signs, random_signs, rotation_for
    from qpalette.runtime import PackedLinear, backends, packed_linear

    backend = backends()["cpu"]
    marks.append(("import", time.perf_counter()))
    side = FEATURES // 16
    chain = []
    for quantizer in full_palette()[::EVERY]:
        codes = torch.randint(-(2**31), 2**31 - 1, (side, side, quantizer.words_per_tile), dtype=torch.int32)
        chain.append(
            PackedLinear(
                codes=backend.to_layout(codes, quantizer.name),
                scales=torch.full((FEATURES,), FEATURES**-0.5).half().view(torch.int16),
                diagonal=pack_signs(random_signs(FEATURES, 0, quantizer.name)),
                spec=quantizer.name,
                rotation=rotation_for(FEATURES, "full").name,
                out_features=FEATURES,
                in_features=FEATURES,
                layout=backend.layout,
            )
        )
    marks.append(("random model", time.perf_counter()))
    for name, tokens in (("prompt", PROMPT), ("first token", 1), ("second token", 1)):
        x = torch.randn(tokens, FEATURES)
        for packed in chain:
            x = packed_linear(x, packed)
        marks.append((name, time.perf_counter()))
    return {name: at - before for (name, at), (_, before) in zip(marks[1:], marks, strict=False)}


def of_a_model(model: Path) -> list[str]:
    return ["-m", "qpalette.cli", "generate", str(model), "Why is the sky blue?", "--max-new-tokens", "16"]


def timed(start: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Seconds of a process until it prints, and until its end; what it prints last, where that is an object."""
    began = time.perf_counter()
    command = [sys.executable, *arguments]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as run,
    ):
        assert run.stdout is not None
        printed = run.stdout.read(1)
        first = time.perf_counter() - began
        printed += run.stdout.read()
        if run.wait():
            said.seek(0)
            raise SystemExit(said.read())
    found = json.loads(printed) if printed.startswith("{") else {"first token printed": first}
    return {"start": start, "whole process": time.perf_counter() - began, **found}


def main(
    model: Annotated[Path | None, typer.Option(help="A quantized directory.")] = None,
    one_start: bool = False,
    name: str | None = None,
) -> None:
    if one_start:
        print(json.dumps(start()))
        return
    arguments = [__file__, "--one-start"] if model is None else of_a_model(model)
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "QPALETTE_COMPILE_CACHE": cache}
        rows = [timed(each, arguments, environment) for each in ("first", "second", "third")]
    facts: dict[str, Any] = {"commit": commit(), "load": os.getloadavg()[0]}
    facts |= {"features": FEATURES, "prompt": PROMPT, "every": EVERY} if model is None else {"model": model.name}
    report(name or ("first_token_cpu" if model is None else "first_token_model"), processor(), rows, **facts)


if __name__ == "__main__":
    typer.run(main)
