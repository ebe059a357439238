"""The demo: a real Llama model, quantized to the size you ask for, measured against the original, and asked a question.

    python examples/demo.py MODEL [--bits 4]

Every step is the command that it prints; nothing else happens here.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

PROMPT = "What is the capital of France? Answer in one sentence."
console = Console()


def qpalette(*arguments: str, capture: bool = False) -> str:
    """Run the command line, showing it first."""
    console.print(f"\n[bold cyan]$ qpalette {shlex.join(arguments)}[/]", soft_wrap=True)
    command = [sys.executable, "-m", "qpalette.cli", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout if capture else ""


def main(model: Path, bits: float = 4, out: Annotated[Path | None, typer.Option()] = None, windows: int = 2) -> None:
    target = out or Path("out") / f"{model.stem}-{bits:g}bit"
    start = time.perf_counter()
    qpalette("quantize", str(model), str(target), "--bits", f"{bits:g}", "--fast", "--overwrite")
    quantized = time.perf_counter() - start
    console.print("\nHow far is it from the original? On text that the original writes itself:")
    measured = json.loads(
        qpalette("eval", str(target), "--reference", str(model), "--windows", str(windows), "--json", capture=True)
    )
    table = Table("", "original", "quantized", title=target.name)
    table.add_row("bits per weight, decoder linears", "16", f"{measured['bits_per_weight']:.3f}")
    table.add_row("perplexity", f"{measured['reference_perplexity']:.2f}", f"{measured['perplexity']:.2f}")
    table.add_row("KL from the original, nats per token", "0", f"{measured['kl']:.4f}")
    table.add_row("same most likely next token", "100 %", f"{100 * measured['top1']:.1f} %")
    table.add_row("weights on disk, MB", "", f"{sum(f.stat().st_size for f in target.glob('*.safetensors')) / 1e6:.1f}")
    table.add_row("time to quantize, s", "", f"{quantized:.0f}")
    console.print(table)
    qpalette("generate", str(target), PROMPT, "--max-new-tokens", "40")


if __name__ == "__main__":
    typer.run(main)
