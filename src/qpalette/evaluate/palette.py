"""Measures a quantizer where theory knows the bound: on a Gaussian source."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch

from qpalette.backends.cuda.timing import graph_seconds
from qpalette.codes import Quantizer
from qpalette.core.errors import InputError
from qpalette.core.records import TILE, TILE_WEIGHTS
from qpalette.rotate import full_rotation
from qpalette.runtime import Backend, PackedLinear, select
from qpalette.runtime.device import parse_device
from qpalette.theory import gap, gap_bits, gap_db

CHUNK_TILES = 8192
WARM_UP_TILES = 16  # compiles the encoder, so that its speed does not include that
WORD_BITS = 32
DECODED_SIDE = 4096  # rows and columns of the matrix whose product is timed
PRODUCTS = 7


@dataclass(frozen=True)
class Measurement:
    """One quantizer on a Gaussian source; distortions are mean squared error over mean square."""

    spec: str
    rate: Fraction  # counted from the stored words
    claimed_distortion: float
    distortion: float
    gap: float  # distortion over Shannon's bound at this rate
    gap_bits: float
    gap_db: float
    encode_weights_per_second: float
    decode_weights_per_second: float  # while one vector is multiplied
    weights: int


def measure(quantizer: Quantizer, weights: int = 1_000_000, seed: int = 0, device: str = "cpu") -> Measurement:
    """Encode and decode `weights` samples of N(0, 1), rounded up to whole tiles, with the best backend of `device`.

    The source is float32 from `torch.Generator` with `seed`, whatever the quantizer. The decoded values are compared
    as they are: no gain is refitted.

    Raises InputError when `weights` is below 1 or there is no such device.
    """
    if weights < 1:
        raise InputError(f"the number of weights to measure on must be at least 1, got {weights}")
    where = parse_device(device)
    backend = select("encode", quantizer.name, where)
    generator = torch.Generator().manual_seed(seed)
    tiles = -(-weights // TILE_WEIGHTS)
    backend.encode(quantizer.name, torch.zeros(WARM_UP_TILES, TILE_WEIGHTS, device=where))
    error = power = seconds = 0.0
    stored_words = 0
    for start in range(0, tiles, CHUNK_TILES):
        source = torch.randn(min(CHUNK_TILES, tiles - start), TILE_WEIGHTS, generator=generator).to(where)
        codes, elapsed = _timed_encode(backend, quantizer, source)
        error += float((backend.decode(quantizer.name, codes) - source).double().square().sum())
        power += float(source.double().square().sum())
        seconds += elapsed
        stored_words += codes.numel()
    rate = Fraction(stored_words * WORD_BITS, tiles * TILE_WEIGHTS)
    assert rate == quantizer.rate, f"{quantizer} states {quantizer.rate} bits per weight and stores {rate}"
    distortion = error / power
    return Measurement(
        spec=quantizer.name,
        rate=rate,
        claimed_distortion=quantizer.claimed_distortion,
        distortion=distortion,
        gap=gap(distortion, rate),
        gap_bits=gap_bits(distortion, rate),
        gap_db=gap_db(distortion, rate),
        encode_weights_per_second=tiles * TILE_WEIGHTS / seconds,
        decode_weights_per_second=DECODED_SIDE**2 / _product_seconds(quantizer, where),
        weights=tiles * TILE_WEIGHTS,
    )


def _timed_encode(backend: Backend, quantizer: Quantizer, source: torch.Tensor) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    codes = backend.encode(quantizer.name, source)
    if source.is_cuda:
        torch.cuda.synchronize(source.device)
    return codes, time.perf_counter() - start


def _product_seconds(quantizer: Quantizer, device: torch.device) -> float:
    """Median seconds of a product with one vector, rotation included: random codes, laid out for the best backend."""
    backend = select("linear", quantizer.name, device)
    side = DECODED_SIDE // TILE
    random, shape = torch.Generator().manual_seed(0), (side, side, quantizer.words_per_tile)
    codes = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64, generator=random).to(device)
    scales = torch.ones(DECODED_SIDE, dtype=torch.float16, device=device).view(torch.int16)
    signs = torch.zeros(DECODED_SIDE // 8, dtype=torch.uint8, device=device)
    rotation = full_rotation(DECODED_SIDE).name
    packed = PackedLinear(
        backend.to_layout(codes.to(torch.int32), quantizer.name),
        scales,
        signs,
        quantizer.name,
        rotation,
        DECODED_SIDE,
        DECODED_SIDE,
        backend.layout,
    )
    x = torch.randn(1, DECODED_SIDE, generator=random).to(device)
    if device.type == "cuda":
        return graph_seconds([partial(backend.linear, x, packed)])
    seconds = []
    for _ in range(PRODUCTS + 1):
        start = time.perf_counter()
        backend.linear(x, packed)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one compiles
