"""The rotation of a linear's input on a CUDA device, in one launch, into the order that the products read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qpalette.kernels.nvrtc import launch, load_kernel
from qpalette.rotate import Factor, Rotation

SOURCE = Path(__file__).with_name("rotate.cu").read_text()
CHUNK_COLUMNS = 256
MOST_HADAMARD_BITS = 9  # of the part that runs in registers: one value per thread
LEAST_THREADS = 256
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True)
class Split:
    """Q = I (x) A (x) H: the dense factor A, float32 and transposed, with H's normalisation in it; H is 2^log_h."""

    dense: torch.Tensor
    log_h: int

    @property
    def order(self) -> int:
        return len(self.dense)


@dataclass(frozen=True)
class Rotated:
    """Tokens in the rotated basis: float16 in fragment or row-major order, and what each was divided by."""

    values: torch.Tensor
    scales: torch.Tensor


def padded_columns(inputs: int) -> int:
    return -(-inputs // CHUNK_COLUMNS) * CHUNK_COLUMNS


@lru_cache(maxsize=256)
def split_rotation(name: str, inputs: int, device: torch.device) -> Split:
    """Of the rotation `name`; its last factor's power of two runs in registers, the rest is dense."""
    rotation = Rotation.parse(name, inputs)
    last = rotation.factors[-1]
    power = last.order & -last.order if last.kind == "h" and last.order & (last.order - 1) == 0 else 1
    log_h = min(power.bit_length() - 1, MOST_HADAMARD_BITS)
    rest = list(rotation.factors[:-1])
    if last.order >> log_h > 1:
        rest.append(Factor(last.kind, last.order >> log_h))
    dense = torch.ones(1, 1, dtype=torch.float64)
    for factor in rest:
        dense = torch.kron(dense, torch.from_numpy(factor.matrix()))
    return Split((dense.T / (1 << log_h) ** 0.5).float().contiguous().to(device), log_h)


def rotate(
    x: torch.Tensor,
    signs: torch.Tensor,
    rotation: str,
    batch: int | None,
    norm: tuple[torch.Tensor, float] | None = None,
) -> Rotated:
    """Q diag(s) x for x [N, K]; signs uint8 [ceil(K/8)], packed.

    For `batch` columns (N or more: 1, 2, 4, 8 or 16) in the order of `multiply.cu`; None gives [N, padded K] by rows.
    `norm` is (weight [K], epsilon) of an RMSNorm to apply first.
    """
    tokens, inputs = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    split = split_rotation(rotation, inputs, x.device)
    h = 1 << split.log_h
    group = max(1, min(LEAST_THREADS // h, inputs // h))
    padded = padded_columns(inputs)
    macros = {
        "DENSE": split.order,
        "LOG_H": split.log_h,
        "GROUP": group,
        "IN_TYPE": TYPES[x.dtype],
        "NORM": int(norm is not None),
        "BATCH": batch or 0,
    }
    device = x.device.index or 0
    kernel = load_kernel(SOURCE, "rotate", macros, device)
    values = torch.empty(batch or tokens, padded, dtype=torch.float16, device=x.device)
    scales = torch.empty(batch or tokens, dtype=torch.float32, device=x.device)
    weight, epsilon = norm or (x, 0.0)
    arguments = [
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_longlong(x.stride(0)),
        ctypes.c_void_p(signs.data_ptr()),
        ctypes.c_void_p(split.dense.data_ptr()),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_float(epsilon),
        ctypes.c_int(inputs),
        ctypes.c_int(padded),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(scales.data_ptr()),
    ]
    blocks = -(-inputs // h // group)
    stream = torch.cuda.current_stream(device).cuda_stream
    overlap = torch.cuda.get_device_capability(device) >= (9, 0)
    launch(kernel, stream, (blocks, tokens), max(64, h * group), 0, arguments, overlap=overlap)
    return Rotated(values, scales)
