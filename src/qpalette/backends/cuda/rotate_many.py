"""The rotation of many tokens on a CUDA device, A first, on matrix instructions: what rotate_many.cu is given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qpalette.backends.cuda.decoder import COMMON_SOURCE

_SHARED, _KERNEL = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("rotate.cuh", "rotate_many.cu")
)
SHARED_SOURCE = COMMON_SOURCE + _SHARED
SOURCE = SHARED_SOURCE + _KERNEL
TILE = 16  # rows of A that an instruction has
WARP = 32
LEAST_HADAMARD_BITS, MOST_HADAMARD_BITS = 5, 10  # a warp's columns; so many that sixteen rows fit into shared memory
MOST_SHARED_BYTES = 96 << 10  # of a block: every device has that, and some have it twice
MOST_THREADS = 512
MOST_TILES = 2  # of a warp, whose sums are in registers
THREADS = 256  # of a block, or nearly
BLOCKS = 512  # that many tokens share, at least, where a token has so many tiles
REMAINDER = 2.0**-23  # of A's largest entry, that what is left of it may be


@dataclass(frozen=True)
class Pieces:
    """A = unit times the sum of matrices of 16 bits, tile by tile as lanes have them: [tiles, tiles, pieces, 32, 8]."""

    values: torch.Tensor
    unit: float

    @property
    def count(self) -> int:
        return self.values.shape[2]


@dataclass(frozen=True)
class TileCut:
    """How A's rows are cut: `tiles` tiles for a warp, `groups` times so many for a block."""

    tiles: int
    groups: int
    threads: int
    blocks: int
    shared_bytes: int


@lru_cache(maxsize=256)
def tile_cut(order: int, log_h: int, tokens: int) -> TileCut:
    """In as many blocks for a token as keep the device busy, of about THREADS threads."""
    tiles_of_rows, wanted = -(-order // TILE), max(1, BLOCKS // tokens)
    cuts = [
        cut_into(order, log_h, tiles, groups)
        for tiles in range(1, min(MOST_TILES, tiles_of_rows) + 1)
        for groups in range(1, -(-tiles_of_rows // tiles) + 1)
    ]
    possible = (cut for cut in cuts if cut.threads <= MOST_THREADS and cut.shared_bytes <= MOST_SHARED_BYTES)
    return min(possible, key=lambda cut: (abs(cut.blocks - wanted), abs(cut.threads - THREADS)))


def cut_into(order: int, log_h: int, tiles: int, groups: int) -> TileCut:
    rows, chunks = TILE * tiles * groups, max(1, (1 << log_h) // 64)
    return TileCut(tiles, groups, WARP * chunks * groups, -(-order // rows), 4 * min(rows, order) << log_h)


def pieces_of(dense: torch.Tensor, dtype: torch.dtype) -> Pieces:
    """Of A, float32 [order, order]: one of a matrix of +-c, else as many as leave nothing that float32 would show."""
    unit, tiles = float(dense.abs().max()), -(-len(dense) // TILE)
    rest = dense.new_zeros(tiles * TILE, tiles * TILE)
    rest[: len(dense), : len(dense)] = dense / unit
    pieces: list[torch.Tensor] = []
    while not pieces or rest.abs().max() > REMAINDER:
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].float()
    # m16n8k16's first operand: [rows' tile][half][row] by [columns' tile][half][lane of four][two] to lanes' eight.
    shape = (len(pieces), tiles, 2, TILE // 2, tiles, 2, 4, 2)
    return Pieces(torch.stack(pieces).view(shape).permute(1, 4, 0, 3, 6, 5, 2, 7).contiguous(), unit)


def tile_macros(
    order: int, log_h: int, cut: TileCut, pieces: int, in_type: int, batch: int | None, cores: bool = False
) -> dict[str, int]:
    """The compile-time constants of rotate_many.cu."""
    return {
        "DENSE": order,
        "LOG_H": log_h,
        "TILES": cut.tiles,
        "GROUPS": cut.groups,
        "PIECES": pieces,
        "IN_TYPE": in_type,
        "BATCH": batch or 0,
        "CORES": int(cores),
    }
