"""The layout of the CUDA kernels, on any device: nothing is lost, and its bits lie where a lane reads them."""

from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from qpalette.backends.cuda import backend
from qpalette.backends.cuda.layout import LAYOUT, check_layout, from_chunks, to_chunks
from qpalette.backends.cuda.multiply import multiply
from qpalette.backends.cuda.rotate import Rotated
from qpalette.backends.cuda.unpack import unpack
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
    assert torch.equal(backend.tile_rows(chunks, rows, codes.shape), codes[rows])


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


@pytest.mark.parametrize("tokens", [1, 16, 40, 100])
def test_stored_codes_are_laid_out_before_a_kernel_reads_them(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, read = [stored("nuq-4", 48, 64), stored("tcq-2-L12", 32, 64)], []
    overlaps = []

    def product(members: list[PackedLinear], tokens: int) -> torch.Tensor:
        check_layout(members)
        read.extend(members)
        return torch.zeros(tokens, 80)

    module = import_module("qpalette.backends.cuda.backend")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(module, "rotate", lambda *_, overlap: overlaps.append(overlap))
    monkeypatch.setattr(module, "multiply", lambda x, tokens, members, dtype: product(members, tokens))
    monkeypatch.setattr(module, "multiply_by_library", lambda x, members, dtype: product(members, tokens))
    assert backend.linears(torch.zeros(tokens, 64), packed).shape == (tokens, 80)
    for member in read:
        assert any(torch.equal(member.codes, to_chunks(matrix.codes)) for matrix in packed)
    assert not any(overlaps), "codes that were made just now are read ahead"
    overlaps.clear()
    laid_out = [replace(matrix, codes=to_chunks(matrix.codes), layout=LAYOUT) for matrix in packed]
    backend.linears(torch.zeros(tokens, 64), laid_out)
    assert all(overlaps)


@pytest.mark.parametrize("layout", [TILES, "lanes"])
def test_the_kernels_take_no_other_layout(layout: str) -> None:
    packed = replace(stored("nuq-4", 32, 64), layout=layout)
    rotated = Rotated(torch.zeros(1, 256).half(), torch.zeros(1))
    for launch in (lambda: multiply(rotated, 1, [packed], torch.float32), lambda: unpack([packed])):
        with pytest.raises(UnsupportedError, match=f"laid out for '{layout}'"):
            launch()
