"""Tokens per second at batch 1 of a quantized model, beside torch float32 and bfloat16 of the original, in one run.

    python benchmarks/decode_speed.py MODEL ARTIFACT [ARTIFACT ...]

Greedy decoding, a prompt of 16 tokens, 128 new ones: by transformers' own `model.generate()`, and quantized models also
as `qpalette generate` runs them. The models take turns, and each round is timed: the median does not move when
something else ran for a while.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import typer
from report import processor, report

from qpalette.bench.generate import make_fast
from qpalette.core.environment import CPU_BYTES
from qpalette.evaluate import load_model

PROMPT, NEW_TOKENS = 16, 128
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def loaded(path: str, dtype: torch.dtype) -> Any:
    model = load_model(path, dtype=dtype)[0]
    model.generation_config.eos_token_id = None  # no answer ends before the last token
    return model


@torch.inference_mode()
def seconds_per_token(model: Any) -> float:
    prompt = torch.arange(100, 100 + PROMPT)[None]
    start = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, pad_token_id=0)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return (time.perf_counter() - start - prefill) / (NEW_TOKENS - 1)


def main(model: str, artifacts: list[str], rounds: int = 7) -> None:
    os.environ.setdefault(CPU_BYTES, "1")  # as the commands do
    models = {f"original {name}": loaded(model, dtype) for name, dtype in TYPES.items()}
    for path in artifacts:
        for name, dtype in TYPES.items():
            title = f"{Path(path).name} {name}"
            models |= {title: loaded(path, dtype), f"{title}, as qpalette generate": loaded(path, dtype)}
            make_fast(models[f"{title}, as qpalette generate"], "never")
    times: dict[str, list[float]] = {name: [] for name in models}
    for each in models.values():
        seconds_per_token(each)  # compiles kernels, fills caches
    for _ in range(rounds):
        for name, each in models.items():
            times[name].append(seconds_per_token(each))
    speeds = {name: 1 / statistics.median(each) for name, each in times.items()}
    fastest = max(speed for name, speed in speeds.items() if name.startswith("original"))
    rows = [
        {"model": name, "tokens/s": speed, "ratio to the faster original": speed / fastest}
        for name, speed in speeds.items()
    ]
    report("decode_speed", processor(), rows, rounds=rounds, prompt=PROMPT, new_tokens=NEW_TOKENS)


if __name__ == "__main__":
    typer.run(main)
