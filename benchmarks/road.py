"""What a user waits for, and gets: the commands from a checkpoint to a planned and tuned artifact, each timed.

    python benchmarks/road.py MODEL --bits 3 --text TEST --calibration TRAIN [--device cpu] [--tokens 65536]
                              [--windows 16] [--effort standard] [--tune "--steps 40 --window 512 ..."]
                              [--work out/road]

Without `--calibration` the model writes the text that it is calibrated and tuned on. With `--one-command` it is
`qpalette quantize MODEL OUT --bits B` alone, which chooses tokens, effort and steps. Processes start cold, as a user's
do. KL is measured after each artifact, on text that nothing was fitted to, outside the time.
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
from report import device_name, report

FOUND = ("kl", "predicted_kl", "perplexity", "bits_per_weight")  # of what eval prints


def main(
    model: str,
    text: Annotated[Path, typer.Option(help="What KL is measured on.")],
    calibration: Annotated[Path | None, typer.Option(help="What is calibrated and tuned on.")] = None,
    bits: str = "3",
    tokens: int = 65_536,
    effort: str = "standard",
    windows: int = 16,
    device: str = "cpu",
    tune: Annotated[str, typer.Option(help="More options of `qpalette tune`.")] = "",
    one_command: Annotated[bool, typer.Option("--one-command", help="What `quantize --bits` does by itself.")] = False,
    work: Path = Path("out/road"),
    name: str = "road",
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    moments, plan, out, tuned = (work / part for part in ("moments", "plan.json", "planned", "tuned"))
    source = ["--text", calibration] if calibration else []
    at = ["--device", device]
    steps: dict[str, list[Any]] = {
        "calibrate": ["calibrate", model, moments, *source, "--tokens", tokens, *at],
        "plan": ["plan", model, "--calibration", moments, "--bits", bits, "--effort", effort, "--out", plan, *at],
        "quantize": ["quantize", model, out, "--plan", plan, "--calibration", moments, *at],
        "tune": ["tune", out, "--reference", model, *source, "--out", tuned, *shlex.split(tune), *at],
    }
    facts = {"model": Path(model).name, "text": text.name, "bits": bits, "windows": windows}
    if one_command:
        steps = {"quantize": ["quantize", model, out, "--bits", bits, *source, *at]}
    else:
        facts |= {"tokens": tokens, "effort": effort, "tune": tune}
    rows: list[dict[str, Any]] = []
    for step, command in steps.items():
        start = time.perf_counter()
        qpalette(*command)
        row: dict[str, Any] = {"step": step, "seconds": round(time.perf_counter() - start, 1)} | dict.fromkeys(FOUND)
        made = Path(command[command.index("--out") + 1]) if step == "tune" else out
        if step in ("quantize", "tune"):
            found = qpalette("eval", made, "--reference", model, "--text", text, "--windows", windows, *at, "--json")
            row |= {key: json.loads(found)[key] for key in FOUND}
        rows.append(row)
        total = round(sum(row["seconds"] for row in rows), 1)
        report(name, device_name(device), rows, **facts, seconds=total)


def qpalette(*arguments: object) -> str:
    """Its standard output; progress goes where ours does."""
    command = [sys.executable, "-m", "qpalette.cli", *map(str, arguments)]
    print("$ qpalette", *command[3:], flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    typer.run(main)
