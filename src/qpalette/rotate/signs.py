"""The random signs of a rotation: one per input, from a seed, stored as bits."""

from __future__ import annotations

import hashlib
import operator

import numpy as np
import torch
from torch import Tensor

from qpalette.core.errors import ArtifactError


def random_signs(dim: int, seed: int, name: str) -> Tensor:
    """int8 [dim] of +-1, the same for ever: bit i of SHAKE-256("{seed}:{name}"), 1 meaning -1.

    Bit i is bit i % 8, counted from the lowest, of byte i // 8. Source: FIPS 202, SHA-3 standard.
    """
    digest = hashlib.shake_256(f"{operator.index(seed)}:{name}".encode()).digest(_bytes_of(dim))
    return _signs_of(np.frombuffer(digest, np.uint8), dim)


def pack_signs(signs: Tensor) -> Tensor:
    """`signs` [K] of +-1, any type, to uint8 [ceil(K / 8)] in the bit order of `random_signs`; unused high bits are 0.

    Raises ValueError when `signs` is not one vector of +-1.
    """
    values = signs.detach().cpu()
    if values.ndim != 1 or not bool((values.abs() == 1).all()):
        raise ValueError(f"signs must be one vector of +1 and -1, got {values.dtype} {tuple(values.shape)}")
    return torch.from_numpy(np.packbits((values < 0).numpy(), bitorder="little"))


def unpack_signs(packed: Tensor, dim: int) -> Tensor:
    """uint8 [ceil(dim / 8)] back to int8 [dim] of +-1, on the device of `packed`.

    Raises ArtifactError when the type or length is wrong or an unused bit is set.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (_bytes_of(dim),):
        raise ArtifactError(
            f"the signs of {dim} inputs must be uint8 [{_bytes_of(dim)}], got {packed.dtype} {tuple(packed.shape)}"
        )
    data = packed.detach().cpu().numpy()
    if dim % 8 and data[-1] >> dim % 8:
        raise ArtifactError(f"the signs of {dim} inputs have a bit set beyond the last input")
    return _signs_of(data, dim).to(packed.device)


def diagonal_of(stored: Tensor, dim: int) -> Tensor:
    """What multiplies an input of `dim` values before the rotation, float32 [dim], on the device of `stored`: uint8
    [ceil(dim / 8)], packed signs, or int16 [dim], the bits of float16 values.

    Nothing is checked, and nothing moves, so that a CUDA graph can hold it.
    """
    if stored.dtype != torch.uint8:
        return stored.view(torch.float16).float()
    bits = stored[:, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device) & 1
    return 1 - 2 * bits.flatten()[:dim].float()


def _bytes_of(dim: int) -> int:
    return -(-dim // 8)


def _signs_of(data: np.ndarray, dim: int) -> Tensor:
    bits = np.unpackbits(data, count=dim, bitorder="little").astype(np.int8)
    return torch.from_numpy(1 - 2 * bits)
