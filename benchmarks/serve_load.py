"""`qpalette serve` under load: clients of the openai package, as many at once as said, and what each of them gets.

    python benchmarks/serve_load.py ARTIFACT [--clients 1 --clients 8] [--requests 200] [--device cpu]

The server runs as a user starts it, in a process of its own. Every second request is streamed; prompts are random
words, and an answer ends after its tokens at the latest. A request is lost if it raises or has no token. The first
requests, by which kernels are compiled and steps captured, are not counted. Memory is the server's: of the process on
a CPU, of the GPU what torch has taken there. "tokens per CPU s" is of the server's processor time, threads added up:
what counts where other work shares the machine.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import openai
import psutil
import typer
from report import device_name, processor, report

from qpalette.integrations.metrics import DEVICE_BYTES

PORT = 8124
CLIENTS = (1, 4, 8, 16)
WORDS = ("river", "old", "mill", "fox", "bread", "salt", "seven", "yellow", "why", "never", "talk", "market")


@dataclass(frozen=True)
class Answer:
    """Of a streamed one, `first` is the seconds to its first token; None of another."""

    tokens: int
    first: float | None
    error: str | None = None


def main(
    artifact: str,
    clients: Annotated[list[int] | None, typer.Option(help="How many at once.")] = None,
    requests: Annotated[int, typer.Option(help="For each number of clients.")] = 200,
    one: Annotated[int | None, typer.Option(help="Requests of one client, where not as many.")] = None,
    tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 64,
    warm: Annotated[int, typer.Option(help="Requests ahead of those that are counted, for each.")] = 32,
    device: str = "cpu",
    dtype: str = "float32",
    batch: int = 8,
    compile: Annotated[str, typer.Option(help="As of `qpalette serve`, on a GPU.")] = "background",
    name: str = "serve_load",
) -> None:
    serve = [sys.executable, "-m", "qpalette.cli", "serve", artifact, "--port", str(PORT), "--batch", str(batch)]
    serve += ["--compile", compile]
    server = subprocess.Popen([*serve, "--", "--device", device, "--dtype", dtype], stdout=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=600)
    rows: list[dict[str, Any]] = []
    facts = {"requests": requests, "tokens": tokens, "batch": batch, "dtype": dtype, "compile": compile}
    facts["artifact"] = Path(artifact).name
    try:
        wait_until_ready(client)
        for count in clients or CLIENTS:
            load(client, artifact, count, max(warm, count), tokens)
            before = psutil.Process(server.pid).cpu_times()
            asked = one if one and count == 1 else requests
            row = {"requests": asked} | measured(load_timed(client, artifact, count, asked, tokens), count)
            after = psutil.Process(server.pid).cpu_times()
            row["tokens per CPU s"] = row["tokens"] / (after.user + after.system - before.user - before.system)
            row["MiB"] = memory(server.pid, device)
            row["over one client"] = row["tokens/s"] / rows[0]["tokens/s"] if rows else 1.0
            rows.append(row)
            report(name, processor() if device == "cpu" else device_name(device), rows, **facts)
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(client: openai.OpenAI) -> None:
    for _ in range(480):
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise SystemExit("the server does not answer")


def load_timed(
    client: openai.OpenAI, model: str, clients: int, requests: int, tokens: int
) -> tuple[list[Answer], float]:
    start = time.perf_counter()
    answers = load(client, model, clients, requests, tokens)
    return answers, time.perf_counter() - start


def load(client: openai.OpenAI, model: str, clients: int, requests: int, tokens: int) -> list[Answer]:
    """Each client asks again as soon as it is answered."""
    chooser = random.Random(0)
    prompts = [" ".join(chooser.choices(WORDS, k=chooser.randint(1, 60))) for _ in range(requests)]
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda pair: ask(client, model, pair[1], tokens, bool(pair[0] % 2)), enumerate(prompts)))


def ask(client: openai.OpenAI, model: str, prompt: str, tokens: int, stream: bool) -> Answer:
    messages: Any = [{"role": "user", "content": f"Tell a story of these: {prompt}"}]
    said: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    start, first, written = time.perf_counter(), None, 0
    try:
        if not stream:
            answer = client.chat.completions.create(**said)
            return Answer(answer.usage.completion_tokens if answer.usage else 0, None)
        for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **said):
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - start
            written = chunk.usage.completion_tokens if chunk.usage else written
        return Answer(written, first)
    except openai.OpenAIError as error:
        return Answer(0, None, str(error))


def measured(timed: tuple[list[Answer], float], clients: int) -> dict[str, Any]:
    answers, seconds = timed
    firsts = [answer.first for answer in answers if answer.first is not None]
    return {
        "clients": clients,
        "lost": sum(answer.error is not None or not answer.tokens for answer in answers),
        "tokens": sum(answer.tokens for answer in answers),
        "tokens/s": sum(answer.tokens for answer in answers) / seconds,
        "median s to first token": statistics.median(firsts),
        "worst s to first token": max(firsts),
    }


def memory(pid: int, device: str) -> float:
    if device != "cpu":  # the whole device's would count whoever else is there
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics").read().decode()
        (line,) = [line for line in metrics.splitlines() if line.startswith(f"{DEVICE_BYTES} ")]
        return float(line.split()[1]) / 2**20
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    typer.run(main)
