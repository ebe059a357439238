"""The layout of the CUDA kernels, on any device: nothing is lost, and its bits lie where a lane reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpalette.backends.cuda import backend
from qpalette.backends.cuda.layout import LAYOUT, check_layout, from_chunks, to_chunks
from qpalette.backends.cuda.product import CudaProduct
from qpalette.backends.cuda.segments import MOST_SEGMENTS
from qpalette.backends.cuda.unpack import cut_into_slabs
from qpalette.codes import parse_spec
from qpalette.codes.bits import unpack_stream
from qpalette.core.errors import UnsupportedError
from qpalette.core.records import TILE_WEIGHTS
from qpalette.rotate import full_rotation
from qpalette.runtime import TILES, PackedLinear, backends

ROWS, COLUMNS = 3, 37  # the last chunk is not full


def random_codes(words: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(words)
    return torch.randint(-(2**31), 2**31, (ROWS, COLUMNS, words), generator=random).to(torch.int32)


@pytest.mark.parametrize("words", [8, 9, 10, 11, 26, 27, 31, 32, 33, 63, 64])
def test_codes_come_back(words: int) -> None:
    codes = random_codes(words)
    chunks = to_chunks(codes)
    assert chunks.shape == (ROWS, 3, 16 * words)  # 16 tiles, and nothing but their bits
    assert torch.equal(from_chunks(chunks, codes.shape), codes)
    rows = torch.tensor([2, 0])
    assert torch.equal(backend.tile_rows(chunks, rows, "nuq-4", codes.shape), codes[rows])


def test_a_lane_keeps_its_bits_of_sixteen_tiles_together() -> None:
    words = 26  # 3.25 bits: three loads of four words, one of one
    codes = random_codes(words)
    lane, chunk = 5, 1
    tiles = unpack_stream(codes[0, 16 * chunk : 16 * chunk + 16]).reshape(16, 32, words)[:, lane].flatten()
    stored = to_chunks(codes)[0, chunk]
    fours = [stored[128 * part + 4 * lane : 128 * part + 4 * lane + 4] for part in range(3)]
    own = torch.cat([*fours, stored[3 * 128 + lane : 3 * 128 + lane + 1]])
    assert torch.equal(unpack_stream(own), tiles)


def stored(spec: str, rows: int, columns: int) -> PackedLinear:
    """Random codes as a file has them."""
    random = torch.Generator().manual_seed(0)
    shape = (-(-rows // 16), -(-columns // 16), parse_spec(spec).words_per_tile)
    codes = torch.randint(-(2**31), 2**31, shape, generator=random).to(torch.int32)
    scales = (torch.rand(rows, generator=random) + 0.5).half().view(torch.int16)
    signs = torch.zeros(-(-columns // 8), dtype=torch.uint8)
    return PackedLinear(codes, scales, signs, spec, full_rotation(columns).name, rows, columns)


@pytest.mark.parametrize("spec", ["tcq-2-L12", "tcq2-3.25", "vq-1.5", "nuq-5"])
@pytest.mark.parametrize("shape", [(16, 16), (200, 90), (257, 304)])
@pytest.mark.parametrize("most", [1, 20_000, 1 << 22])
def test_the_weight_is_the_reference_in_both_layouts_within_a_bound_of_memory(
    spec: str, shape: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = stored(spec, *shape)
    wanted = backends()["ref"].rotated_weight(packed)
    decoded = []
    monkeypatch.setattr(import_module("qpalette.backends.cuda.backend"), "DECODED_WEIGHTS", most)
    monkeypatch.setattr(
        type(backend),
        "decode",
        lambda self, spec, codes: decoded.append(len(codes) * TILE_WEIGHTS) or parse_spec(spec).decode(codes),
    )
    for matrix in (packed, replace(packed, codes=to_chunks(packed.codes), layout=LAYOUT)):
        assert torch.equal(backend.rotated_weight(matrix), wanted)
    row_of_tiles = packed.codes.shape[1] * TILE_WEIGHTS
    assert max(decoded) <= max(most + row_of_tiles, row_of_tiles)


class Recorded:
    """In the place of CudaProduct: what it was made of."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self, members: Sequence[PackedLinear], overlap: bool = True) -> None:
        check_layout(members)
        self.members, self.overlap = members, overlap
        self.made.append(self)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


def test_stored_codes_are_laid_out_before_a_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("qpalette.backends.cuda.backend"), "CudaProduct", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    packed, x = [stored("nuq-4", 48, 64), stored("tcq-2-L12", 32, 64)], torch.zeros(1, 64)
    backend.linears(x, packed)
    product = backend.product(packed)
    product(x)
    packed[1].codes.add_(1)
    product(x)
    assert len(Recorded.made) == 3
    assert not any(made.overlap for made in Recorded.made), "codes that were made just now are read ahead"
    for made in Recorded.made[1:]:
        assert torch.equal(made.members[0].codes, to_chunks(packed[0].codes))
    assert not torch.equal(Recorded.made[1].members[1].codes, Recorded.made[2].members[1].codes)
    assert torch.equal(Recorded.made[2].members[1].codes, to_chunks(packed[1].codes)), "a change in place is not seen"
    laid_out = [replace(matrix, codes=to_chunks(matrix.codes), layout=LAYOUT) for matrix in packed]
    assert backend.product(laid_out).overlap
    unaligned = torch.cat([laid_out[0].diagonal[:1], laid_out[0].diagonal])[1:]
    backend.product([replace(matrix, diagonal=unaligned) for matrix in laid_out])(x)
    assert not Recorded.made[-1].overlap
    assert torch.equal(Recorded.made[-1].members[0].diagonal, unaligned)


@pytest.mark.parametrize("layout", [TILES, "lanes"])
def test_the_kernels_take_no_other_layout(layout: str) -> None:
    with pytest.raises(UnsupportedError, match=f"laid out for '{layout}'"):
        CudaProduct([replace(stored("nuq-4", 32, 64), layout=layout)])


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 60))
def test_every_row_is_in_one_slab_and_no_slab_is_too_high(row_tiles: list[int], most_tiles: int) -> None:
    members = [
        PackedLinear(torch.zeros(tiles, 1, 64), *(torch.zeros(1),) * 2, "nuq-4", "h16", 16 * tiles - 3, 16, LAYOUT)
        for tiles in row_tiles
    ]
    found: dict[int, list[int]] = {index: [] for index in range(len(members))}
    for parts in cut_into_slabs(members, most_tiles):
        assert len(parts) <= MOST_SEGMENTS
        assert sum(part.source.tiles for part in parts) <= most_tiles
        place = 0
        for part in parts:
            assert part.source.packed is members[part.index]
            assert part.place == place
            place += part.source.height
            found[part.index] += range(part.source.first_row, part.source.first_row + part.source.rows)
    assert all(rows == list(range(16 * tiles - 3)) for rows, tiles in zip(found.values(), row_tiles, strict=True))
