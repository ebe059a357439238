"""A device by its name, checked before hours of work are planned for it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from qpalette.core.errors import InputError
from qpalette.core.text import first_line


def parse_device(name: str | torch.device) -> torch.device:
    """`"cuda:0"` -> the device. Raises InputError when there is no such device on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"'{name}' is not a device: give cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"there is no device {name}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA device(s)"
        )
    if device.type not in ("cpu", "cuda"):
        try:
            torch.ones(1, device=device).item()
        except Exception as error:  # each kind of device has its own
            reason = first_line(error)
            raise InputError(f"torch {torch.__version__} cannot compute on {name} here ({reason})") from error
    return device


def device_name(device: torch.device) -> str:
    """Of a GPU, or of the processor with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
