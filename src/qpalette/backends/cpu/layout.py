"""Codes as the CPU kernel reads them: word i of sixteen tile rows side by side, one per SIMD lane.

Stored codes are [tile rows][tile columns][words]. Here they are [groups of 16 tile rows][tile columns][words][rows of
the group], flat, so that one vector load brings the same word of sixteen circles. It is a permutation plus sixteen
words of tail, for the last, narrower group reads past its end (those lanes are dropped).
"""

from __future__ import annotations

import torch

LANES = 16


def to_lanes(codes: torch.Tensor) -> torch.Tensor:
    """int32 [R, C, n] -> int32 [R C n + 16]."""
    rows = codes.shape[0]
    whole = rows - rows % LANES
    full = codes[:whole].reshape(-1, LANES, *codes.shape[1:]).permute(0, 2, 3, 1).reshape(-1)
    rest = codes[whole:].permute(1, 2, 0).reshape(-1)
    return torch.cat([full, rest, codes.new_zeros(LANES)])


def from_lanes(flat: torch.Tensor, rows: int, columns: int, words: int) -> torch.Tensor:
    """Inverse of `to_lanes`."""
    whole = rows - rows % LANES
    cut, end = whole * columns * words, rows * columns * words
    full = flat[:cut].reshape(-1, columns, words, LANES).permute(0, 3, 1, 2).reshape(whole, columns, words)
    rest = flat[cut:end].reshape(columns, words, rows - whole).permute(2, 0, 1)
    return torch.cat([full, rest]).contiguous()
