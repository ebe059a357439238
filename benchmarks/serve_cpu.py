"""Requests of several threads answered together, without HTTP: tokens by processor time, on one thread.

    python benchmarks/serve_cpu.py ARTIFACT [--clients 1 --clients 8] [--requests 2] [--tokens 32]

What `serve` does below its server: each client asks again as soon as it is answered. Processor time is the process',
so that what else the machine does counts little. One round of requests ahead compiles kernels and captures steps.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import commit, processor, report
from serve_load import WORDS

from qpalette.core.environment import CPU_BYTES
from qpalette.evaluate import load_model
from qpalette.generation import attach
from qpalette.generation.native import ProgramCapture


def main(
    artifact: str,
    clients: Annotated[list[int] | None, typer.Option(help="How many at once.")] = None,
    requests: Annotated[int, typer.Option(help="Of each client.")] = 2,
    tokens: Annotated[int, typer.Option(help="Of an answer.")] = 32,
    batch: int = 8,
    name: str = "serve_cpu",
) -> None:
    os.environ.setdefault(CPU_BYTES, "1")  # as the commands do
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for count in clients or (1, 8):
        model, tokenizer = load_model(artifact, dtype=torch.float32)
        capture = ProgramCapture()
        attach(model, "never", capture, slots=batch)
        prompts = prompts_of(tokenizer, count * (requests + 1))
        with ThreadPoolExecutor(count) as pool:
            ask = partial(answered, model, tokens)
            list(pool.map(ask, prompts[:count]))
            capture.wait()
            start = time.process_time()
            written = sum(pool.map(ask, prompts[count:]))
            seconds = time.process_time() - start
        row = {"clients": count, "tokens": written, "CPU s": seconds, "tokens per CPU s": written / seconds}
        row["over one client"] = row["tokens per CPU s"] / rows[0]["tokens per CPU s"] if rows else 1.0
        rows.append(row)
        facts = {"artifact": Path(artifact).name, "commit": commit(), "batch": batch, "load": os.getloadavg()[0]}
        report(name, processor(), rows, **facts)


def prompts_of(tokenizer: Any, count: int) -> list[Any]:
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(WORDS, k=chooser.randint(1, 60))) for _ in range(count)]
    said = [[{"role": "user", "content": f"Tell a story of these: {text}"}] for text in texts]
    return [
        tokenizer.apply_chat_template(each, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for each in said
    ]


def answered(model: Any, tokens: int, prompt: Any) -> int:
    """How many new tokens: as many as asked for. No end token, since no client of a server asks for a least number:
    the two processors that see to it took 2 ms a token of SmolLM2 and are outside the captured step."""
    answer = model.generate(**prompt, max_new_tokens=tokens, eos_token_id=None, do_sample=False)
    return int(answer.shape[1] - prompt["input_ids"].shape[1])


if __name__ == "__main__":
    typer.run(main)
