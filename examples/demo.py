"""The demo: a real Llama model in as few bits as you ask for, beside the original and beside one code for all weights.

    python examples/demo.py MODEL [--bits 3] [--tokens 32768] [--steps 40] [--effort standard] [--fast]

Every step is the command that it prints; nothing else happens here. `--fast` leaves out all but the one code.
`--tokens`, `--steps` and `--effort` are those of `qpalette quantize`. Here they are less than its own: a fifth of the
text, 16 steps of tuning for 40, and trellises of fewer states. That is quicker, and KL is larger.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "docs" / "any-model.md"  # English that no model has seen
RESULTS = ROOT / "benchmarks" / "results"
PROMPT = "What is the capital of France? Answer in one sentence."
console = Console()


def qpalette(*arguments: object) -> None:
    """Run the command line, showing it first."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold cyan]$ qpalette {shlex.join(words)}[/]", soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", "qpalette.cli", *words]).returncode
    if code:
        sys.exit(code)


def main(
    model: Path,
    bits: float = 3,
    fast: Annotated[bool, typer.Option(help="Minutes: without calibration, plan and tuning.")] = False,
    tokens: int = 6144,
    steps: int = 16,
    effort: str = "fast",
    out: Path = Path("out"),
    text: Annotated[Path, typer.Option(help="What all are compared on.")] = TEXT,
    windows: int = 2,
) -> None:
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    planned, one_code = (out / f"{model.stem}-{bits:g}bit{kind}" for kind in ("", "-one-code"))
    page, picture = (out / f"{planned.name}{suffix}" for suffix in (".html", ".png"))
    if not fast:
        cost = ("--tokens", tokens, "--steps", steps, "--effort", effort)
        qpalette("quantize", model, planned, "--bits", f"{bits:g}", *cost, "--report", page, "--overwrite")
    once = ("--fast", "--effort", "fast", "--also", "*", "--overwrite")
    qpalette("quantize", model, one_code, "--bits", f"{bits:g}", *once)
    made = [one_code] if fast else [planned, one_code]
    console.print("\nHow far from the original, for how many bytes?")
    qpalette("compare", model, *made, "--text", text, "--windows", windows, "--no-speed", "--plot", picture)
    show_others()
    console.print("\nThe original, and what was made of it:")
    for answering in (model, made[0]):
        qpalette("generate", answering, PROMPT, "--max-new-tokens", 40)
    drawn = [picture] if fast else [picture, page]
    console.print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes. Look at {' and '.join(map(str, drawn))}")


def show_others() -> None:
    """What `qpalette compare` measured before of models that others have made, in files of this repository."""
    for file in sorted(RESULTS.glob("compare_*.json")):
        compared = json.loads(file.read_text(encoding="utf-8"))
        others = [row for row in compared["models"] if row["kl"] is not None and row["format"] != "qpalette"]
        table = Table("model", "MB", "KL", title=f"Measured before, on {Path(compared['text']).name}: {file.name}")
        for row in sorted(others, key=_size):
            table.add_row(Path(row["model"]).name, f"{_size(row) / 1e6:.1f}", f"{row['kl']:.4f}")
        console.print(table)


def _size(row: dict[str, Any]) -> int:
    return row["file_bytes"]


if __name__ == "__main__":
    typer.run(main)
