"""Transforms of a model's keys in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qpalette.core.errors import InputError
from qpalette.kvcache.transform import Transform, made_of

TRANSFORMS_FILE = "qpalette_cache.safetensors"  # in a quantized model's directory


def write_transforms(file: Path, transforms: Sequence[Transform], provenance: Mapping[str, str]) -> None:
    """matrix float16 [heads, dim, dim] and mean float32 [heads, dim] of each layer; whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, transform in enumerate(transforms):
        tensors[f"{layer}.matrix"] = transform.matrix.half().cpu().contiguous()
        tensors[f"{layer}.mean"] = transform.mean.float().cpu().contiguous()
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, dict(provenance))
    os.replace(temporary, file)


def read_transforms(file: Path, layers: int) -> list[Transform]:
    """Of `layers` layers. Raises InputError naming the file when it does not hold them."""
    try:
        with safe_open(file, "pt") as stored:
            if set(stored.keys()) != {f"{layer}.{name}" for layer in range(layers) for name in ("matrix", "mean")}:
                raise InputError(f"{file} does not have the transforms of {layers} layers; remove it, or make it anew")
            pairs = [(stored.get_tensor(f"{i}.matrix"), stored.get_tensor(f"{i}.mean")) for i in range(layers)]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}); remove it, or make it anew") from error
    return [_checked(file, matrix, mean) for matrix, mean in pairs]


def _checked(file: Path, matrix: torch.Tensor, mean: torch.Tensor) -> Transform:
    shaped = matrix.ndim == 3 and matrix.shape[1] == matrix.shape[2] and mean.shape == matrix.shape[:2]
    typed = (matrix.dtype, mean.dtype) == (torch.float16, torch.float32)
    if not (shaped and typed and bool(matrix.isfinite().all()) and bool(mean.isfinite().all())):
        raise InputError(f"{file} holds no transforms of keys; remove it, or make it anew")
    try:
        return made_of(matrix, mean)
    except RuntimeError as error:
        raise InputError(f"{file} has a transform that cannot be undone; remove it, or make it anew") from error
