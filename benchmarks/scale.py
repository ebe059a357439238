"""A model of 1.1 thousand million parameters, quantized in bounded memory, beside what the dry run promised.

    python benchmarks/scale.py [--spec tcq-3.25-L12] [--layers 22] [--workers 1]

The model is a random Llama of TinyLlama's sizes in bfloat16 (2.2 GB on disk), written tensor by tensor. It is quantized
by the command in processes of its own, whose peak memory together is set against that of as many processes which have
quantized a model of a few thousand weights: the interpreter, the libraries and the compiled search.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from memory import write_llama
from peak_memory import peak_memory
from report import processor, report

import qpalette
from qpalette.pipeline import Estimate
from qpalette.storage import open_checkpoint

TINY_LLAMA = {"hidden": 2048, "inner": 5632, "kv": 256, "vocabulary": 32000}


def measure(source: Path, out: Path, spec: str, workers: int) -> dict[str, float]:
    """Seconds, bytes of memory and of disk, of quantizing in a process of its own."""
    disk, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            files = [file for folder in out.parent.glob(f"{out.name}*") for file in folder.rglob("*")]
            disk.append(sum(file.stat().st_size for file in files if file.is_file()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        command = [sys.executable, __file__, "--measure", source, "--out", out, "--spec", spec, "--workers", workers]
        memory, _ = peak_memory(list(map(str, command)))
    finally:
        done.set()
        watcher.join()
    return {"seconds": time.perf_counter() - start, "memory": float(memory), "disk": float(max(disk))}


def main(
    spec: str = "tcq-3.25-L12",
    layers: int = 22,
    workers: int = 1,
    work: Annotated[Path | None, typer.Option(help="Where the models go.  [default: a temporary folder]")] = None,
    measure_: Annotated[Path | None, typer.Option("--measure", hidden=True)] = None,
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if measure_ is not None and out is not None:
        qpalette.quantize(measure_, out, spec=spec, workers=workers)
        return
    with tempfile.TemporaryDirectory(dir=work) as folder:
        write_llama(Path(folder, "base"), 64, 1)
        base = measure(Path(folder, "base"), Path(folder, "base-out"), spec, workers)
        source = Path(folder, "source")
        write_llama(source, TINY_LLAMA["hidden"], layers, **{k: v for k, v in TINY_LLAMA.items() if k != "hidden"})
        promised: Any = qpalette.quantize(source, Path(folder, "out"), spec=spec, dry_run=True)
        assert isinstance(promised, Estimate)
        truth = measure(source, Path(folder, "out"), spec, workers)
        checkpoint = open_checkpoint(source)
        parameters = sum(info.nbytes // info.dtype.itemsize for info in checkpoint.tensors.values())
        print(json.dumps(truth))
        above = truth["memory"] - base["memory"]
        rows = [
            {"": "seconds", "dry run": promised.seconds, "truth": truth["seconds"]},
            {"": "memory above the libraries, MB", "dry run": promised.peak_memory_bytes / 1e6, "truth": above / 1e6},
            {"": "disk, MB", "dry run": promised.disk_bytes / 1e6, "truth": truth["disk"] / 1e6},
        ]
        for row in rows:
            row["ratio"] = row["truth"] / row["dry run"]
        report(
            "scale", processor(), rows, spec=spec, parameters=parameters, source_mb=checkpoint.total_bytes / 1e6,
            libraries_mb=base["memory"] / 1e6, workers=workers,
            weights_per_second=promised.weights / truth["seconds"],
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
