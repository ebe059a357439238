"""What a product costs on a device, by the stopwatch of its backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def launch_seconds(parts: Sequence[tuple[str, int, int]], batch: int, device: torch.device) -> float:
    """Seconds of one launch over `parts` (spec, out-features, in-features), which read one input, with its rotation;
    weights are random, and cold."""
    if device.type == "cuda":
        from qpalette.backends.cuda import probe as cuda

        return cuda.launch_seconds(parts, batch, device, with_rotation=True)
    from qpalette.backends.cpu import probe as cpu

    return cpu.launch_seconds(parts, batch)


def plain_seconds(rows: int, columns: int, batch: int, device: torch.device) -> float:
    """Seconds of torch's product with a matrix that is not quantized, in the type that models have on the device."""
    if device.type == "cuda":
        from qpalette.backends.cuda import probe as cuda

        return cuda.plain_seconds(rows, columns, batch, device)
    from qpalette.backends.cpu import probe as cpu

    return cpu.plain_seconds(rows, columns, batch)
