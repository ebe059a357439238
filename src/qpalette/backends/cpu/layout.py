"""Codes as the CPU kernels read them: word i of sixteen tiles side by side, one per SIMD lane.

Stored codes are [tile rows][tile columns][words]. Here they are [blocks of 4 tile rows][blocks of 4 tile columns]
[words][4 x 4 tiles], so that one vector load brings the same word of sixteen circles. Square blocks waste little where
a matrix is no multiple (SmolLM2's 36 tile rows would take 48 lanes in groups of sixteen). Missing tiles are zeros.
Within a tile the bits of some codes are in another order (`fields`).
"""

from __future__ import annotations

import torch

from qpalette.backends.cpu.fields import from_fields, in_fields, to_fields
from qpalette.codes import parse_spec

LAYOUT = "cpu-lanes"  # its name
SIDE = 4  # tiles; SIDE * SIDE lanes


def blocks_of(tiles: int) -> int:
    """Number of blocks that cover `tiles` tile rows or columns."""
    return -(-tiles // SIDE)


def to_layout(codes: torch.Tensor, spec: str) -> torch.Tensor:
    """int32 [R, C, n] -> int32 [ceil(R/4), ceil(C/4), n, 16]."""
    rows, columns, words = codes.shape
    padded = codes.new_zeros(blocks_of(rows) * SIDE, blocks_of(columns) * SIDE, words)
    padded[:rows, :columns] = codes
    blocks = padded.reshape(blocks_of(rows), SIDE, blocks_of(columns), SIDE, words)
    lanes = blocks.permute(0, 2, 4, 1, 3).reshape(blocks_of(rows), blocks_of(columns), words, SIDE * SIDE)
    return to_fields(lanes.contiguous(), spec) if in_fields(parse_spec(spec)) else lanes.contiguous()


def from_layout(lanes: torch.Tensor, spec: str, rows: int, columns: int, words: int) -> torch.Tensor:
    """Inverse of `to_layout`, for codes of shape [rows, columns, words]."""
    streams = from_fields(lanes, spec) if in_fields(parse_spec(spec)) else lanes
    blocks = streams.reshape(blocks_of(rows), blocks_of(columns), words, SIDE, SIDE).permute(0, 3, 1, 4, 2)
    return blocks.reshape(blocks_of(rows) * SIDE, blocks_of(columns) * SIDE, words)[:rows, :columns].contiguous()


def tile_rows(lanes: torch.Tensor, rows: torch.Tensor, spec: str, columns: int) -> torch.Tensor:
    """Stored codes [len(rows), columns, n] of the tile rows `rows`, int64."""
    words = lanes.shape[2]
    wanted = lanes[rows // SIDE]
    streams = from_fields(wanted, spec) if in_fields(parse_spec(spec)) else wanted
    apart = streams.reshape(len(rows), -1, words, SIDE, SIDE)
    own = apart[torch.arange(len(rows)), :, :, rows % SIDE]
    return own.transpose(2, 3).reshape(len(rows), -1, words)[:, :columns]
