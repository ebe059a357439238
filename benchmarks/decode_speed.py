"""Tokens per second at batch 1 of a quantized model, beside torch float32 and bfloat16 of the original, in one run.

    python benchmarks/decode_speed.py MODEL ARTIFACT [ARTIFACT ...]

Greedy decoding by transformers' generate, a prompt of 16 tokens, 128 new ones. The models take turns, and each round
is timed: the median does not move when something else ran for a while.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import typer
from report import processor, report

from qpalette.evaluate import load_model

PROMPT, NEW_TOKENS = 16, 128


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
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return (time.perf_counter() - start - prefill) / (NEW_TOKENS - 1)


def main(model: str, artifacts: list[str], rounds: int = 7) -> None:
    models = {f"original {dtype}": load_model(model, dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16)}
    for path in artifacts:
        for dtype in (torch.float32, torch.bfloat16):
            models[f"{path} {dtype}"] = load_model(path, dtype=dtype)[0]
    times: dict[str, list[float]] = {name: [] for name in models}
    for each in models.values():
        seconds_per_token(each)  # compiles kernels, fills caches
    for _ in range(rounds):
        for name, each in models.items():
            times[name].append(seconds_per_token(each))
    speeds = {name: 1 / statistics.median(each) for name, each in times.items()}
    fastest = max(speed for name, speed in speeds.items() if name.startswith("original"))
    rows = [
        {"model": name.replace("torch.", ""), "tokens/s": speed, "ratio to the faster original": speed / fastest}
        for name, speed in speeds.items()
    ]
    report("decode_speed", processor(), rows, rounds=rounds, prompt=PROMPT, new_tokens=NEW_TOKENS)


if __name__ == "__main__":
    typer.run(main)
