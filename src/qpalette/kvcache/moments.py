"""What is known of a model's keys, and of the queries that read them: in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qpalette.core.errors import InputError

MOMENTS_FILE = "qpalette_cache.safetensors"  # in a quantized model's directory
_NAMES = ("mean", "covariance", "queries")


@dataclass(frozen=True)
class KeyMoments:
    """Of one layer's keys after the rotary embedding: mean float32 [heads, dim], covariance float32 [heads, dim, dim];
    queries float32 [heads, dim, dim], the second moment of those that read each head."""

    mean: Tensor
    covariance: Tensor
    queries: Tensor


def write_moments(file: Path, moments: Sequence[KeyMoments], provenance: Mapping[str, str]) -> None:
    """All layers; whole or not at all."""
    tensors = {
        f"{layer}.{name}": getattr(moment, name).float().cpu().contiguous()
        for layer, moment in enumerate(moments)
        for name in _NAMES
    }
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, dict(provenance))
    os.replace(temporary, file)


def read_moments(file: Path, layers: int) -> list[KeyMoments]:
    """Of `layers` layers. Raises InputError naming the file when it does not hold them."""
    try:
        with safe_open(file, "pt") as stored:
            if set(stored.keys()) != {f"{layer}.{name}" for layer in range(layers) for name in _NAMES}:
                raise InputError(f"{file} does not have the moments of {layers} layers; remove it, or make it anew")
            found = [KeyMoments(*(stored.get_tensor(f"{i}.{name}") for name in _NAMES)) for i in range(layers)]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}); remove it, or make it anew") from error
    for moments in found:
        _check(file, moments)
    return found


def _check(file: Path, moments: KeyMoments) -> None:
    mean, covariance, queries = moments.mean, moments.covariance, moments.queries
    shaped = mean.ndim == 2 and covariance.shape == queries.shape == (*mean.shape, mean.shape[-1])
    tensors = (mean, covariance, queries)
    if not shaped or not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in tensors):
        raise InputError(f"{file} holds no moments of keys; remove it, or make it anew")
