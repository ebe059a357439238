"""The palette of a cache: codes that a few instructions decode, each index at most one byte.

`nuq` and `vq` have the tables of the weights' quantizers of that name. `vq4`, points of four dimensions, is here alone:
weights reach its rates with a trellis, whose search is too slow for a cache that is written while it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from qpalette.codes import parse_spec
from qpalette.core.errors import SpecError
from qpalette.core.rate import format_rate, parse_rate

MOST_INDEX_BITS = 8
VQ4_INDEX_BITS = range(4, MOST_INDEX_BITS + 1)
VQ4_CODEBOOKS = Path(__file__).with_name("vq4_codebooks.safetensors")
_COMPARED = 1 << 22  # distances that are held at a time
# Mean squared error on N(0, 1), by index bits, as `benchmarks/make_vq4_codebooks.py` printed it.
_VQ4_DISTORTION = {4: 0.345888, 5: 0.251884, 6: 0.183856, 7: 0.133307, 8: 0.096336}


@dataclass(frozen=True)
class CacheCode:
    """`width` neighbours of a vector of unit variance become the index of the nearest of 2^index_bits points."""

    name: str
    width: int
    index_bits: int
    distortion: float  # mean squared error on N(0, 1)

    @property
    def rate(self) -> Fraction:
        """Bits per number, of the codes alone."""
        return Fraction(self.index_bits, self.width)

    def points(self, device: torch.device) -> torch.Tensor:
        """float32 [2^index_bits, width]."""
        return _points(self, device)


def nearest(vectors: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """float32 [..., d] and a table [n, width] -> uint8 [..., d / width], the index of the nearest point, the first of
    equals."""
    parts = vectors.reshape(-1, points.shape[1])
    chunk = max(1, _COMPARED // len(points))
    index = [(part[:, None, :] - points).square().sum(-1).argmin(1) for part in parts.split(chunk)]
    return torch.cat(index).to(torch.uint8).reshape(*vectors.shape[:-1], -1)


def look_up(index: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """uint8 [..., d / width] -> float32 [..., d]."""
    return points[index.long()].flatten(-2)


@lru_cache(maxsize=256)
def _points(code: CacheCode, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # made inside it, they would break a later backward pass
        if code.width == 4:
            return _vq4_codebooks()[str(code.index_bits)].float().to(device)
        return parse_spec(code.name).entries().to(device)


@cache
def _vq4_codebooks() -> dict[str, torch.Tensor]:
    return load_file(VQ4_CODEBOOKS)


@lru_cache(maxsize=256)
def parse_code(name: str) -> CacheCode:
    """ "nuq-4", "vq-2.5", "vq4-1.5" -> the code. Raises SpecError that lists what there is."""
    family, _, parameters = name.partition("-")
    if family == "vq4":
        index_bits = parse_rate(parameters) * 4
        if index_bits in VQ4_INDEX_BITS:
            bits = int(index_bits)
            return CacheCode(f"vq4-{format_rate(Fraction(bits, 4))}", 4, bits, _VQ4_DISTORTION[bits])
    elif family in ("nuq", "vq"):
        quantizer = parse_spec(name)
        decoder = quantizer.decoder
        assert decoder is not None
        if decoder.index_bits <= MOST_INDEX_BITS:
            return CacheCode(quantizer.name, decoder.width, decoder.index_bits, quantizer.claimed_distortion)
    known = ", ".join(f"{codes[0].name} .. {codes[-1].name}" for codes in _families())
    raise SpecError(f"'{name}' is no code of a cache: known are {known}")


@cache
def cache_palette() -> tuple[CacheCode, ...]:
    """Every code of a cache, family by family, by rising rate."""
    return tuple(code for codes in _families() for code in codes)


@cache
def _families() -> tuple[tuple[CacheCode, ...], ...]:
    nuq = tuple(parse_code(f"nuq-{bits}") for bits in range(2, MOST_INDEX_BITS + 1))
    vq = tuple(parse_code(f"vq-{format_rate(Fraction(bits, 2))}") for bits in range(3, MOST_INDEX_BITS + 1))
    vq4 = tuple(parse_code(f"vq4-{format_rate(Fraction(bits, 4))}") for bits in VQ4_INDEX_BITS)
    return nuq, vq, vq4
