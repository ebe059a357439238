"""A device by its name, checked before hours of work are planned for it."""

from __future__ import annotations

import torch

from qpalette.core.errors import InputError


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
    return device
