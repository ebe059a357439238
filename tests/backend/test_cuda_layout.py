"""The layout of the CUDA kernels, on any device: nothing is lost, and its bits lie where a lane reads them."""

import pytest
import torch

from qpalette.backends.cuda import backend
from qpalette.backends.cuda.layout import from_chunks, to_chunks
from qpalette.codes.bits import unpack_stream

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
