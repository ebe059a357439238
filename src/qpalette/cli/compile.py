"""qpalette compile: every CUDA kernel that a quantized model needs, before it serves."""

from __future__ import annotations

import time
from typing import Annotated

import typer


def compile_kernels(
    artifact: Annotated[str, typer.Argument(help="Quantized model: a directory, or a Hub id.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")] = "1,2,4,8,16",
    device: Annotated[str, typer.Option(help="CUDA device.")] = "cuda",
) -> None:
    """Compile the model's CUDA kernels into the cache, so that the first request waits for none.

    Example: [bold]qpalette compile OUT --batch 1,8[/]
    """
    import torch

    from qpalette.core.errors import InputError
    from qpalette.evaluate import load
    from qpalette.runtime.device import parse_device

    where = parse_device(device)
    if where.type != "cuda":
        raise InputError(f"{device} needs no kernels compiled: give a CUDA device, such as cuda")
    try:
        sizes = [int(text) for text in batch.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batch {batch}: give positive whole numbers, such as 1,8")
    start = time.perf_counter()
    model, _ = load(artifact, device=where)
    with torch.inference_mode():
        for size in sizes:
            model(input_ids=torch.zeros(size, 1, dtype=torch.int64, device=where), use_cache=False)
    torch.cuda.synchronize(where)
    typer.echo(f"kernels ready for batches {batch}, {time.perf_counter() - start:.1f} s with loading")
