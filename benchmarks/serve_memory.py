"""Whether `qpalette serve` keeps what it takes: 200 requests of random lengths, and the device's memory after each.

    python benchmarks/serve_memory.py ARTIFACT [--requests 200] [--device cuda]

The server runs as a user starts it, in a process of its own; memory is what the device says is in use, by all.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import urllib.request
from typing import Annotated, Any

import torch
import typer
from report import device_name, report

PORT = 8123
AFTER = 20  # requests, memory is to stay as it is
WORDS = ("river", "old", "mill", "fox", "bread", "salt", "seven", "yellow", "why", "never", "talk", "market")


def main(
    artifact: str,
    requests: int = 200,
    device: str = "cuda",
    compile: Annotated[str, typer.Option(help="never, background or now.")] = "never",
    name: str = "serve_memory",
) -> None:
    command = [sys.executable, "-m", "qpalette.cli", "serve", artifact, "--port", str(PORT), "--compile", compile]
    server = subprocess.Popen([*command, "--", "--device", device], stdout=subprocess.DEVNULL)
    try:
        wait_until_ready()
        used, seconds, tokens = [], 0.0, 0
        chooser = random.Random(0)
        for _ in range(requests):
            start = time.perf_counter()
            tokens += ask(artifact, chooser.randint(1, 600), chooser.randint(1, 200), chooser.choice([0.0, 0.7]))
            seconds += time.perf_counter() - start
            free, total = torch.cuda.mem_get_info()
            used.append((total - free) / 2**20)
    finally:
        server.terminate()
        server.wait(30)
    row = {
        "requests": requests,
        "MiB after 1": used[0],
        f"MiB after {AFTER}": used[AFTER - 1],
        "MiB at most after that": max(used[AFTER:]),
        "MiB at the end": used[-1],
        "tokens/s": tokens / seconds,
    }
    report(name, device_name(device), [row], compile=compile, used=[round(each) for each in used])


def wait_until_ready() -> None:
    for _ in range(240):
        try:
            call("/v1/models")
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server does not answer")


def ask(model: str, words: int, tokens: int, temperature: float) -> int:
    """Tokens of the answer to so many random words."""
    content = " ".join(random.choices(WORDS, k=words))
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
    return int(call("/v1/chat/completions", body | {"temperature": temperature})["usage"]["completion_tokens"])


def call(path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


if __name__ == "__main__":
    typer.run(main)
