"""A vector as bytes: the indexes of its numbers in bit planes, and one byte of scale. docs/cache.md has every bit.

A vector is coded alone, so that it can be dropped, copied or shared without a look at its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from qpalette.core.errors import SpecError
from qpalette.kvcache.codes import CacheCode, look_up, nearest

# Coordinates that are coded at once where errors are shaped. On SmolLM2's keys the loss is 4 % over the bound; blocks
# of 2 would be at 0.3 %, blocks of 16 at 27 % (benchmarks/cache.py).
BLOCK = 8
SCALE_STEPS = 12  # of a scale, per octave: rounding it after the codes costs (ln 2 / 12)^2 / 12 of a vector's square
SCALE_ONE = 160  # the byte of the scale 1: 2^-13 .. 2^8, for coordinates whose transform has made them about 1, or not


@dataclass(frozen=True)
class VectorFormat:
    """Vectors of `dim` numbers in `code`.

    unbiased: where errors are not shaped, the scale is y.y / y.c, c the decoded levels: what is decoded then has, along
    y, the length of y. A near optimal code shrinks what it codes, an error along y, and that is where the queries are
    that read a key. Else the scale is least squares, y.c / c.c.

    Raises SpecError when `dim` is no multiple of the code's width.
    """

    code: CacheCode
    dim: int
    unbiased: bool

    def __post_init__(self) -> None:
        if self.dim % self.code.width:
            raise SpecError(f"{self.code.name} takes {self.code.width} numbers at a time, and heads have {self.dim}")

    @property
    def code_bytes(self) -> int:
        """Of a vector, without its scale."""
        return sum(-(-self.units * width // 8) for width in planes(self.code.index_bits))

    @property
    def bits(self) -> Fraction:
        """Stored bits per number, scale and padding included."""
        return Fraction(8 * (self.code_bytes + 1), self.dim)

    @property
    def units(self) -> int:
        return self.dim // self.code.width

    def encode(
        self, vectors: torch.Tensor, points: torch.Tensor, shaping: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float [batch, heads, tokens, dim] -> uint8 [..., code_bytes] and uint8 [...], the scales. What is not finite
        becomes zeros.

        `points` are those of the code, on the device of `vectors`: a compiled step can read no table from a file.
        `shaping` is a transform's feedback and gain.
        """
        y = vectors.float()
        if shaping is not None:
            return self._encode_shaped(y, points, *shaping)
        root = y.square().mean(-1, keepdim=True).sqrt()
        index = nearest(y / root.clamp(min=torch.finfo(torch.float32).tiny), points)
        levels = look_up(index, points)
        cross = (y * levels).sum(-1)
        scale = y.square().sum(-1) / cross if self.unbiased else cross / levels.square().sum(-1)
        return pack(index, self.code.index_bits), scale_bytes(scale)

    def _encode_shaped(
        self, y: torch.Tensor, points: torch.Tensor, feedback: torch.Tensor, gain: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block after block, each with what the errors before it have cost."""
        scales = scale_bytes(y.square().mean(-1).sqrt() * gain[:, None])
        scale = scales_of(scales)[..., None]
        divisor = torch.where(scale == 0, 1.0, scale)
        indexes, errors = [], y[..., :0]
        for start in range(0, self.dim, BLOCK):
            block = y[..., start : start + BLOCK]
            wanted = block + errors @ feedback[:, start : start + BLOCK, :start].mT
            index = nearest(wanted / divisor, points)
            indexes.append(index)
            errors = torch.cat([errors, block - look_up(index, points) * scale], -1)
        return pack(torch.cat(indexes, -1), self.code.index_bits), scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """float32 [..., dim]."""
        levels = look_up(unpack(codes, self.code.index_bits, self.units), points)
        return levels * scales_of(scales)[..., None]


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes that hold indexes of `bits`, widest first: 8, 4, 2, 1. No field crosses a byte."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack(index: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., n] below 2^bits -> uint8 [..., bytes]: plane after plane, the first with the lowest bits, in each the
    first index lowest; a plane's last byte is filled with zeros."""
    parts, shift = [], 0
    for width in planes(bits):
        field = index >> shift & ((1 << width) - 1)
        per_byte = 8 // width
        field = torch.nn.functional.pad(field, (0, -field.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
        place = torch.arange(0, 8, width, dtype=torch.uint8, device=index.device)
        parts.append((field << place).sum(-1, dtype=torch.uint8))
        shift += width
    return torch.cat(parts, -1)


def unpack(codes: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [..., bytes] -> uint8 [..., count]; undoes `pack`."""
    index, start, shift = None, 0, 0
    for width in planes(bits):
        stop = start + -(-count * width // 8)
        place = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        field = codes[..., start:stop, None] >> place & ((1 << width) - 1)
        field = field.flatten(-2)[..., :count] << shift
        index = field if index is None else index | field
        start, shift = stop, shift + width
    assert index is not None
    return index


def scale_bytes(scales: torch.Tensor) -> torch.Tensor:
    """float32 -> uint8: the nearest of 2^((i - SCALE_ONE) / SCALE_STEPS), i = 1 .. 255, by ratio; 0 for what is below
    them, negative or not finite."""
    exponent = (scales.log2() * SCALE_STEPS).round() + SCALE_ONE
    return torch.where(scales.isfinite(), exponent.nan_to_num(0.0), 0.0).clamp(0, 255).to(torch.uint8)


def scales_of(stored: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32."""
    exponent = (stored.float() - SCALE_ONE) / SCALE_STEPS
    return torch.where(stored == 0, 0.0, exponent.exp2())
