"""What every benchmark prints and keeps: the machine, the date, the rows."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qpalette.backends.cpu import instructions
from qpalette.runtime import device as runtime

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's model name, the threads in use, and the widest instructions that kernels are compiled for."""
    kinds = {"AVX-512": instructions.HAS_AVX512, "AVX2": instructions.HAS_AVX2}
    widest = next((name for name, present in kinds.items() if present), platform.machine())
    return f"{runtime.device_name(torch.device('cpu'))}, {widest}"


def device_name(device: str) -> str:
    """The processor, or the GPU that `device` ("cuda") stands for."""
    return runtime.device_name(torch.device(device))


def commit() -> str:
    """Of what runs: $QPALETTE_COMMIT where that is set, as for a copy without its history, or git's; "unknown" rather
    than a wrong one."""
    if told := os.environ.get("QPALETTE_COMMIT"):
        return told
    if not (ROOT / ".git").exists():  # git would answer for a folder around it
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def report(name: str, device: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Print `rows` as a table and write them, with device and date, to benchmarks/results/`name`.json."""
    table = Table(title=f"{name} on {device}, {date.today()}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    keep(name, device, rows, **facts)


def keep(name: str, device: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Write `rows`, with device and date, to benchmarks/results/`name`.json."""
    content = {"device": device, "date": str(date.today()), "torch": torch.__version__, **facts, "rows": list(rows)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
