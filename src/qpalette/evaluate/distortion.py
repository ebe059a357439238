"""The distortion of a quantizer on a Gaussian source, and how closely it is known.

At high rates few weights carry much of the mean squared error, those beyond the codebook: with plain samples, a
standard error of half a percent takes 2 * 10^7 weights of tcq-8-L12. Two classical means make 5 * 10^5 do: such weights
are planted, and the tiles that hold them count less (importance sampling); and the power of the source, which is known,
is regressed out (a control variate). Owen, Monte Carlo theory, methods and examples, chapters 8 and 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch

from qpalette.codes import Quantizer
from qpalette.core.records import TILE_WEIGHTS
from qpalette.runtime import select
from qpalette.runtime.device import parse_device

CHUNK_TILES = 256
PLANTED = 0.25  # of the tiles
TAIL = (2.5, 6.5)  # magnitudes of a planted weight; beyond, there is one weight in 10^10


@dataclass(frozen=True)
class Distortion:
    """Mean squared error of a quantizer on N(0, 1)."""

    value: float
    relative_error: float  # one sigma, of sampling
    weights: int


def estimate_distortion(
    quantizer: Quantizer,
    relative_error: float,
    *,
    least: int = 1 << 16,
    most: int = 1 << 24,
    seed: int = 0,
    device: str = "cpu",
) -> Distortion:
    """Encode and decode tiles until `relative_error` is reached, of `least` to `most` weights.

    Raises InputError when there is no such device.
    """
    where, random = parse_device(device), torch.Generator().manual_seed(seed)
    columns: list[torch.Tensor] = []
    while True:
        tiles, weight = planted_tiles(CHUNK_TILES, random)
        source = tiles.to(where)
        codes = select("encode", quantizer.name, where).encode(quantizer.name, source)
        errors = (quantizer.decode(codes) - source).double().square().mean(1).cpu()
        power = tiles.double().square().mean(1)
        columns.append(weight * torch.stack([errors, torch.ones_like(weight), power]))
        found = _regressed(torch.cat(columns, 1))
        if found.weights >= most or (found.weights >= least and found.relative_error <= relative_error):
            return found


def planted_tiles(count: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles, float32 [count, 256], and the weight of each, float64 [count]: the density of N(0, 1) over that of the
    tiles, in which PLANTED have one weight, anywhere, of uniform magnitude in TAIL."""
    tiles = torch.randn(count, TILE_WEIGHTS, generator=random)
    planted = torch.rand(count, generator=random) < PLANTED
    place = torch.randint(TILE_WEIGHTS, (count,), generator=random)
    low, high = TAIL
    size = low + (high - low) * torch.rand(count, generator=random)
    sign = 1 - 2 * torch.randint(2, (count,), generator=random)
    tiles[planted, place[planted]] = (sign * size)[planted]
    x = tiles.double()
    normal = (-x.square() / 2).exp() / (2 * pi) ** 0.5
    uniform = ((x.abs() >= low) & (x.abs() < high)) / (2 * (high - low))
    return tiles, 1 / (1 - PLANTED + PLANTED * (uniform / normal).mean(1))


def _regressed(values: torch.Tensor) -> Distortion:
    """The mean of the first row of `values`, float64 [3, tiles], given that the other rows have the expectation 1."""
    tiles = values.shape[1]
    centred = values - values.mean(1, keepdim=True)
    slopes = torch.linalg.lstsq(centred[1:].T, centred[0][:, None]).solution[:, 0]
    mean = float(values[0].mean() - slopes @ (values[1:].mean(1) - 1))
    variance = float((centred[0] - slopes @ centred[1:]).square().mean()) / tiles
    return Distortion(mean, variance**0.5 / mean, tiles * TILE_WEIGHTS)
