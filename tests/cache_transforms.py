"""Transforms of a cache's vectors, made up: no moments are needed."""

from __future__ import annotations

import torch

from qpalette.kvcache import Transform, white
from qpalette.kvcache.transform import made_of
from qpalette.kvcache.vectors import BLOCK


def transform_of(kind: str, heads: int, dim: int) -> Transform:
    """ "fed back": as `shaped` makes them, a matrix, a mean, and errors that later blocks make good; but of no moments,
    which would take seconds a head."""
    if kind == "white":
        return white(dim)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0]
    plain = made_of(basis * torch.linspace(0.5, 2, dim), torch.randn(heads, dim, generator=generator))
    number = torch.arange(dim) // BLOCK
    below = (number[:, None] > number) * torch.randn(heads, dim, dim, generator=generator) / dim**0.5
    return Transform(plain.matrix, plain.inverse, plain.mean, below, 1 + torch.rand(heads, generator=generator))
