"""How codes are stored, and the numbers that they stand for; each declared once, for all formats."""

from __future__ import annotations

import math

import torch

# Sign, two bits of exponent, one of mantissa (E2M1 of the OCP Microscaling specification).
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
# A power of two; the last code is not a number (E8M0 of the same).
E8M0 = torch.tensor([*(2.0 ** (exponent - 127) for exponent in range(255)), torch.nan])
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> int32 [..., 2 n], the low four bits of each byte first."""
    pairs = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return pairs.flatten(start_dim=-2).int()


def fp4(packed: torch.Tensor) -> torch.Tensor:
    """Bytes of two E2M1 numbers [..., n] -> float32 [..., 2 n]."""
    return FP4[nibbles(packed.view(torch.uint8))]


def e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """One byte each -> float32."""
    return E8M0[exponents.view(torch.uint8).int()]


def bit_fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., 32 n / bits]: the words as one stream of numbers of at most 8 bits, low bits first.

    n is a multiple of what holds whole numbers: of 3 for 3 bits.
    """
    common = math.gcd(bits, 32)
    words = words.unflatten(-1, (-1, bits // common))
    fields = torch.empty(*words.shape[:-1], 32 // common, dtype=torch.uint8)
    for place in range(32 // common):
        word, low = divmod(place * bits, 32)
        first = min(bits, 32 - low)  # bits in this word; the shift of a negative one brings ones
        value = (words[..., word] >> low) & ((1 << first) - 1)
        if first < bits:
            value = value | ((words[..., word + 1] & ((1 << (bits - first)) - 1)) << first)
        fields[..., place] = value
    return fields.flatten(start_dim=-2)


def spread(grid: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """One value per block [a, b] -> one per number, `shape`; the last blocks may be cut."""
    rows = grid.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]
