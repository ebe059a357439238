"""Seconds to load a model with a rate in place of a quantized directory: the first time, and from the cache.

    python benchmarks/quantize_on_load.py MODEL [--bits 4] [--effort fast] [--device cpu]
    python benchmarks/quantize_on_load.py random-8b --device cuda

MODEL is a directory or a .gguf file, which is written as a plain directory first, since transformers takes a
quantization_config with those only. Each load is a process of its own, which then computes one token; the cache is
empty, but for compiled kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from memory import write_llama
from report import device_name, report

from qpalette.core.cache import CACHE, COMPILE_CACHE, compile_cache_directory
from qpalette.storage import open_checkpoint, plain_directory

RANDOM = "random-8b"
LLAMA_8B = {"hidden": 4096, "layers": 32, "inner": 14336, "kv": 1024, "vocabulary": 128256}


def load(model: str, bits: str, effort: str, device: str) -> dict[str, float]:
    """One load in this process: seconds of each part, and of all processors together, which others do not change."""
    marks = [("", time.perf_counter())]
    import transformers

    import qpalette

    marks.append(("import", time.perf_counter()))
    config = qpalette.Config(bits=bits, effort=effort)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map=device)
    marks.append(("load", time.perf_counter()))
    with torch.inference_mode():
        loaded(torch.tensor([[1]], device=device)).logits.cpu()
    marks.append(("one token", time.perf_counter()))
    parts = {name: at - before for (name, at), (_, before) in zip(marks[1:], marks, strict=False)}
    return parts | {"processor": time.process_time()}


def main(
    model: str,
    bits: str = "4",
    effort: str = "fast",
    device: str = "cpu",
    work: Annotated[Path | None, typer.Option(help="Where models and cache go.  [default: a temporary folder]")] = None,
    one_load: Annotated[bool, typer.Option("--one-load", hidden=True)] = False,
) -> None:
    if one_load:
        print(json.dumps(load(model, bits, effort, device)))
        return
    with tempfile.TemporaryDirectory(dir=work) as folder:
        os.environ[COMPILE_CACHE] = str(compile_cache_directory())
        os.environ[CACHE] = str(Path(folder, "cache"))
        if model == RANDOM:
            source = Path(folder, RANDOM)
            write_llama(source, **LLAMA_8B)
        else:
            source = plain_directory(open_checkpoint(model))
        command = [sys.executable, __file__, source, "--bits", bits, "--effort", effort, "--device", device]
        rows = []
        for name in ("first", "second"):
            run = subprocess.run([*map(str, command), "--one-load"], stdout=subprocess.PIPE, check=True, text=True)
            rows.append({"": name, **json.loads(run.stdout.splitlines()[-1])})
        report(
            "quantize_on_load",
            device_name(device),
            rows,
            model=Path(model).name,
            bits=bits,
            effort=effort,
            load_average=os.getloadavg()[0],
        )


if __name__ == "__main__":
    typer.run(main)
