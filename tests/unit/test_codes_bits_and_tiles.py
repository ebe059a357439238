"""Bit streams and tiles against Python's own integers and index arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpalette.codes.bits import pack_fields, pack_stream, unpack_stream, windows
from qpalette.codes.tiles import from_tiles, scan_order, to_tiles
from qpalette.core.records import tiles_of
from qpalette.formats import packed_bits


def big_integer(words: torch.Tensor) -> int:
    return int("".join(f"{int(word) & 0xFFFFFFFF:032b}" for word in words), 2)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
def test_streams_round_trip_and_are_most_significant_first(values: list[int]) -> None:
    bits = torch.tensor([[value >> (31 - i) & 1 for i in range(32)] for value in values]).reshape(-1)
    words = pack_stream(bits)
    assert [int(word) & 0xFFFFFFFF for word in words] == values
    assert torch.equal(unpack_stream(words), bits)


def test_a_stream_must_fill_its_words() -> None:
    with pytest.raises(ValueError, match="31 bits does not fill"):
        pack_stream(torch.zeros(31))


@given(st.data(), st.integers(1, 6), st.integers(1, 32))
def test_windows_are_slices_of_the_circle(data: st.DataObject, count: int, length: int) -> None:
    words = torch.tensor(data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=count, max_size=count)))
    total = 32 * count
    stream = f"{big_integer(words):0{total}b}" * 3
    ends = torch.arange(1, total + 1)
    expected = [int(stream[total + end - length : total + end], 2) for end in ends.tolist()]
    assert windows(words.to(torch.int32), ends, length).tolist() == expected


def test_fields_are_concatenated() -> None:
    fields, widths = torch.tensor([[5, 1, 0, 1023, 3]]), torch.tensor([3, 1, 2, 10, 16])
    assert big_integer(pack_fields(fields, widths)[0]) == int("10110011111111110000000000000011", 2)


@given(st.integers(1, 70), st.integers(1, 70))
def test_tiles_round_trip_with_zero_padding(rows: int, columns: int) -> None:
    matrix = torch.arange(1.0, rows * columns + 1).reshape(rows, columns)
    tiles = to_tiles(matrix)
    assert tiles.shape == (tiles_of(rows), tiles_of(columns), 256)
    assert torch.equal(from_tiles(tiles, rows, columns), matrix)
    assert float(tiles.sum()) == float(matrix.sum())


def test_scan_order_is_the_operand_order_of_the_matrix_instruction() -> None:
    """PTX ISA, fragment A of mma.m16n8k16: a0..a7 of lane i, with g = i / 4 and q = i % 4."""
    row, column = scan_order()
    for lane in range(32):
        g, q = lane // 4, lane % 4
        expected = [(g + down, 2 * q + right + odd) for right in (0, 8) for down in (0, 8) for odd in (0, 1)]
        owned = slice(8 * lane, 8 * lane + 8)
        assert list(zip(row[owned].tolist(), column[owned].tolist(), strict=True)) == expected


def test_padding_scales_and_signs_are_counted() -> None:
    rate = Fraction(13, 4)
    bits = packed_bits(rate, 17, 33)  # 2 x 3 tiles
    assert bits.codes == rate * 256 * 6
    assert (bits.scales, bits.signs) == (16 * 17, 40)
    assert bits.rate == Fraction(bits.codes + 16 * 17 + 40, 17 * 33)
