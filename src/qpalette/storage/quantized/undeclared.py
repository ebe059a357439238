"""What only a quantized model holds: where no format accounts for it, nobody knows what the weights are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from qpalette.storage.base import TensorInfo
from qpalette.storage.quantized.base import Unread
from qpalette.storage.quantized.numbers import FP8

EXPERTS = ("gate_up", "down")  # in stacks
# The last part of a tensor's name, and whose it is. No plain model has one.
SIGNS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "SCB": "bitsandbytes, int8",
    "absmax": "bitsandbytes, 4 bits",
    "weight_packed": "compressed-tensors",
    "weight_scale": "fp8 or int8 with scales",
    "weight_scale_inv": "fp8 with scales",
    "weight_scale_2": "ModelOpt, NVFP4",
    **{f"{name}_proj_{part}": "MXFP4" for name in EXPERTS for part in ("blocks", "scales")},
    **{f"{name}_proj_scale_inv": "fp8 with scales" for name in EXPERTS},
}
NUMBERS = re.compile(r".*\.(?:weight|scale)|.*\bexperts\.\w*proj")
NO_NUMBERS = (*FP8, torch.float8_e8m0fnu, torch.uint32)  # without scales, or without unpacking
WHOLE = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64)
OWN_FILE = "quantize_config.json"  # of GPTQ's tools


def refuse_encoded(infos: Iterable[TensorInfo], directory: Path, known: str | None) -> None:
    """Raises Unread naming the first of `infos` that is no plain tensor. The format `known` from config.json, if there
    is one, accounts for none of them."""
    for info in infos:
        tool = SIGNS.get(info.name.rpartition(".")[2])
        encoded = info.dtype in NO_NUMBERS or (info.dtype in WHOLE and NUMBERS.fullmatch(info.name))
        if tool is None and not encoded:
            continue
        kind = str(info.dtype).removeprefix("torch.")
        hint = ""
        if (directory / OWN_FILE).is_file():
            hint = (
                f"; {OWN_FILE} is not read: put its content into config.json as quantization_config, with quant_method "
                "and checkpoint_format (gptq or gptq_v2)"
            )
        why = f"which {known} does not explain" if known else f"and config.json does not say how{hint}"
        raise Unread(f"tensor {info.name!r} is {kind}, {tool or 'packed'}, {why}")
