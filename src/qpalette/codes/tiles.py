"""Matrices as 16 x 16 tiles, and the scan order of the 256 weights inside a tile.

The scan order is part of every code (DESIGN section 4). It is the register order of the A operand of NVIDIA's
mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"): step 8 i + e is element e of lane i, so that a GPU lane
owns eight consecutive steps, a whole number of bits at every multiple of 1/8 bit per weight.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from qpalette.core.records import TILE, TILE_WEIGHTS, tiles_of


@lru_cache(maxsize=16)
def scan_order(device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) within the tile of each of the 256 steps, int64 on `device`."""
    step = torch.arange(TILE_WEIGHTS, device=device)
    lane, element = step // 8, step % 8
    row = lane // 4 + 8 * (element // 2 % 2)
    column = 2 * (lane % 4) + element % 2 + 8 * (element // 4)
    return row, column


def to_tiles(matrix: torch.Tensor) -> torch.Tensor:
    """[M, K] -> [ceil(M/16), ceil(K/16), 256] in scan order; missing rows and columns are zeros."""
    rows, columns = tiles_of(matrix.shape[0]), tiles_of(matrix.shape[1])
    padded = matrix.new_zeros(rows * TILE, columns * TILE)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    blocks = padded.reshape(rows, TILE, columns, TILE).transpose(1, 2)
    row, column = scan_order(matrix.device)
    return blocks[:, :, row, column]


def from_tiles(tiles: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """Inverse of `to_tiles`, the padding cut off."""
    rows, columns = tiles.shape[0], tiles.shape[1]
    blocks = tiles.new_empty(rows, columns, TILE, TILE)
    row, column = scan_order(tiles.device)
    blocks[:, :, row, column] = tiles
    return blocks.transpose(1, 2).reshape(rows * TILE, columns * TILE)[:out_features, :in_features]
