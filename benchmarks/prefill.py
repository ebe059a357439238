"""A prompt until its first token on a GPU, by each road of prompts, beside float16: eager, captured, and kernels alone.

    python benchmarks/prefill.py [--config llama-3.1-8b] [--spec tcq2-3.25] [--tokens 1024]

Models of random weights in one run, taking turns; milliseconds, and over float16. The longest kernels are printed.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer
from eager import ROUNDS, Task, built, busy_seconds, prompt_tasks, seconds
from report import commit, device_name, keep, report

from qpalette.bench.decode import release
from qpalette.runtime import prefill_by
from qpalette.runtime.prefill import ROADS

CALLS = 6  # of each task and round
TASKS = ("eager", "captured", "busy")


def main(
    config: Annotated[list[str] | None, typer.Option()] = None,
    spec: str = "tcq2-3.25",
    tokens: Annotated[list[int] | None, typer.Option()] = None,
    device: str = "cuda",
    name: str = "prefill",
) -> None:
    rows: list[dict[str, Any]] = []
    for model in config or ["llama-3.1-8b"]:
        plain, packed = (built(model, weights, torch.device(device)) for weights in ("float16", spec))
        for count in tokens or [1024]:
            rows += measured(model, plain, packed, spec, count)
            keep(name, device_name(device), rows, commit=commit())
        del plain, packed
        release()
    report(name, device_name(device), rows, commit=commit())


def measured(name: str, plain: Any, packed: Any, spec: str, tokens: int) -> list[dict[str, Any]]:
    """A row for float16, and for each road; a captured prompt keeps the road that it was captured on."""
    ways: dict[str, tuple[Any, str | None]] = {"float16": (plain, None)}
    ways |= {f"{spec}, {road}": (packed, road) for road in ROADS}
    tasks: dict[str, dict[str, Task]] = {}
    for way, (model, road) in ways.items():
        with prefill_by(road):
            tasks[way] = prompt_tasks(model, tokens)
    times: dict[str, dict[str, list[float]]] = {way: {task: [] for task in named} for way, named in tasks.items()}
    for _ in range(ROUNDS):
        for way, named in tasks.items():
            with prefill_by(ways[way][1]):
                for task, (run, wait) in named.items():
                    run()
                    times[way][task] += [seconds(run, wait) for _ in range(CALLS)]
    rows = []
    for way, samples in times.items():
        with prefill_by(ways[way][1]):
            busy = busy_seconds(f"{name}, {tokens} tokens, {way}", tasks[way]["eager"][0])
        found = {task: statistics.median(taken) * 1e3 for task, taken in samples.items()} | {"busy": busy * 1e3}
        first = rows[0] if rows else None
        row = {"model": name, "tokens": tokens, "weights": way} | {f"{task} ms": found[task] for task in TASKS}
        rows.append(
            row | {f"{task} ratio": 1.0 if first is None else found[task] / first[f"{task} ms"] for task in TASKS}
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
