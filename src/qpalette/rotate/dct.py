"""The orthonormal DCT-II, for orders that have no Hadamard matrix.

C[k, n] = s_k cos(pi (2n + 1) k / (2N)), k, n = 0..N-1, with s_0 = sqrt(1/N) and s_k = sqrt(2/N) otherwise.
Source: K. Rao and P. Yip, Discrete Cosine Transform (1990), section 2.2; by FFT as in J. Makhoul, "A fast cosine
transform in one and two dimensions", IEEE Trans. ASSP 28 (1980).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def dct_matrix(order: int) -> NDArray[np.float64]:
    """C as float64 [order, order]; orthogonal, its inverse is its transpose."""
    n = np.arange(order)
    steps = np.outer(n, 2 * n + 1) % (4 * order)  # a full turn; small angles keep their digits
    matrix = np.cos(math.pi / (2 * order) * steps) * math.sqrt(2 / order)
    matrix[0] = math.sqrt(1 / order)
    return matrix


def dct(x: Tensor) -> Tensor:
    """C x over the last axis of float32 or float64 `x`, without the matrix."""
    order = x.shape[-1]
    shuffled = torch.cat([x[..., 0::2], x[..., 1::2].flip(-1)], dim=-1)
    return (torch.fft.fft(shuffled) * _twiddle(x).conj()).real * _scale(x) * math.sqrt(2 / order)


def inverse_dct(y: Tensor) -> Tensor:
    """C^T y over the last axis of float32 or float64 `y`."""
    order = y.shape[-1]
    unscaled = y / _scale(y) * math.sqrt(order / 2)
    mirrored = torch.cat([torch.zeros_like(y[..., :1]), unscaled[..., 1:].flip(-1)], dim=-1)
    shuffled = torch.fft.ifft(torch.complex(unscaled, -mirrored) * _twiddle(y)).real
    x = torch.empty_like(y)
    half = (order + 1) // 2
    x[..., 0::2], x[..., 1::2] = shuffled[..., :half], shuffled[..., half:].flip(-1)
    return x


def _twiddle(x: Tensor) -> Tensor:
    """exp(i pi k / (2N)) for k = 0..N-1; the angle in float64, as k is large."""
    angle = torch.arange(x.shape[-1], device=x.device, dtype=torch.float64) * (math.pi / (2 * x.shape[-1]))
    return torch.polar(torch.ones_like(angle), angle).to(
        torch.complex128 if x.dtype == torch.float64 else torch.complex64
    )


def _scale(x: Tensor) -> Tensor:
    scale = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
    scale[0] = math.sqrt(0.5)
    return scale
