"""The bytes of a cached vector, against loops that spell out docs/cache.md."""

import math
from fractions import Fraction

import pytest
import torch

from qpalette.core.errors import SpecError
from qpalette.kvcache import VectorFormat, cache_palette, parse_code
from qpalette.kvcache.codes import nearest
from qpalette.kvcache.vectors import BLOCK, SCALE_ONE, SCALE_STEPS, pack, planes, scale_bytes, scales_of, unpack

CPU = torch.device("cpu")
ALL = [code.name for code in cache_palette()]


def bit_by_bit(index: list[int], bits: int) -> list[int]:
    """Plane after plane, the lowest bits first; in a plane the first index in the lowest bits of the first byte."""
    stored: list[int] = []
    shift = 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        plane = [0] * -(-len(index) * width // 8)
        for place, value in enumerate(index):
            for bit in range(width):
                at = place * width + bit
                plane[at // 8] |= (value >> (shift + bit) & 1) << at % 8
        stored += plane
        shift += width
    return stored


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 5, 16, 32])
def test_planes_are_packed_bit_by_bit(bits, count):
    index = torch.randint(1 << bits, (3, count), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    stored = pack(index, bits)
    assert stored.tolist() == [bit_by_bit(row, bits) for row in index.tolist()]
    assert torch.equal(unpack(stored, bits, count), index)
    assert sum(planes(bits)) == bits


def test_a_scale_byte_is_the_nearest_by_ratio():
    every = torch.arange(1, 256, dtype=torch.uint8)
    steps = [2 ** ((byte - SCALE_ONE) / SCALE_STEPS) for byte in range(1, 256)]
    assert scales_of(every).tolist() == pytest.approx(steps, rel=1e-5)
    assert torch.equal(scale_bytes(scales_of(every)), every)
    between = torch.tensor([steps[40] * 2 ** (0.49 / SCALE_STEPS), steps[40] * 2 ** (0.51 / SCALE_STEPS)])
    assert scale_bytes(between).tolist() == [41, 42]
    odd = torch.tensor([0.0, -1.0, math.nan, math.inf, 1e-30, 1e30])
    assert scale_bytes(odd).tolist() == [0, 0, 0, 0, 0, 255]
    assert scales_of(torch.zeros(1, dtype=torch.uint8)).item() == 0


@pytest.mark.parametrize("name", ALL)
def test_codes_do_what_they_claim(name):
    code = parse_code(name)
    numbers = torch.randn(1 << 16, 4, generator=torch.Generator().manual_seed(1))
    points = code.points(CPU)
    error = numbers - points[nearest(numbers, points).long()].flatten(-2)
    assert error.square().mean().item() == pytest.approx(code.distortion, rel=0.03)
    assert points.shape == (1 << code.index_bits, code.width)


@pytest.mark.parametrize("name", ["nuq-3", "vq-2.5", "vq4-1.5"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_a_vector_is_coded_as_the_formulas_say(name, unbiased):
    code, dim = parse_code(name), 16
    format = VectorFormat(code, dim, unbiased)
    vectors = torch.randn(1, 1, 5, dim, generator=torch.Generator().manual_seed(2)) * 3
    points = code.points(CPU)
    codes, scales = format.encode(vectors, points)
    decoded = format.decode(codes, scales, points)
    for vector, stored, scale, found in zip(vectors[0, 0], codes[0, 0], scales[0, 0], decoded[0, 0], strict=True):
        unit = vector / vector.square().mean().sqrt()
        index = [int((part - points).square().sum(1).argmin()) for part in unit.split(code.width)]
        assert stored.tolist() == bit_by_bit(index, code.index_bits)
        levels = torch.cat([points[i] for i in index])
        best = vector @ vector / (vector @ levels) if unbiased else vector @ levels / (levels @ levels)
        assert scale == scale_bytes(best)
        torch.testing.assert_close(found, levels * scales_of(scale))


def test_shaped_errors_are_fed_back_block_by_block():
    code, dim = parse_code("vq-2"), 24
    format = VectorFormat(code, dim, unbiased=True)
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(2, 3, 4, dim, generator=generator)
    feedback = torch.randn(3, dim, dim, generator=generator)
    number = torch.arange(dim) // BLOCK
    feedback = feedback * (number[:, None] > number)
    gain = torch.tensor([1.0, 1.1, 1.3])
    points = code.points(CPU)
    codes, scales = format.encode(vectors, points, (feedback, gain))
    decoded = format.decode(codes, scales, points)
    for head in range(3):
        vector, error = vectors[1, head, 2], torch.zeros(dim)
        scale = scales_of(scale_bytes(vector.square().mean().sqrt() * gain[head]))
        for start in range(0, dim, code.width):
            part = slice(start, start + code.width)
            wanted = vector[part] + feedback[head, part] @ error
            chosen = points[(wanted / scale - points).square().sum(1).argmin()] * scale
            torch.testing.assert_close(decoded[1, head, 2, part], chosen)
            error[part] = vector[part] - chosen


def test_all_bits_are_counted():
    assert VectorFormat(parse_code("vq-3"), 64, True).bits == 3 + 8 / 64
    assert VectorFormat(parse_code("vq-2.5"), 128, True).bits == 2.5 + 8 / 128
    assert VectorFormat(parse_code("nuq-3"), 20, True).bits == Fraction(8 * (5 + 3 + 1), 20)  # 20 bits take 3 bytes
    odd = parse_code("nuq-3")
    assert VectorFormat(odd, 20, True).encode(torch.ones(1, 1, 1, 20), odd.points(CPU))[0].shape[-1] == 8


def test_a_vector_that_is_zero_or_not_finite_is_read_as_zeros():
    format = VectorFormat(parse_code("vq-3"), 16, unbiased=True)
    vectors = torch.zeros(1, 1, 3, 16)
    vectors[0, 0, 1, 3], vectors[0, 0, 2, 5] = math.nan, math.inf
    points = format.code.points(CPU)
    assert not format.decode(*format.encode(vectors, points), points).any()


def test_what_no_code_is_is_told():
    for name in ("tcq-3", "vq-5", "nuq-9", "vq4-3", "vq4-1.1", "vq4-", "", "vq"):
        with pytest.raises(SpecError):
            parse_code(name)
    with pytest.raises(SpecError, match="4 numbers at a time"):
        VectorFormat(parse_code("vq4-2"), 30, unbiased=False)
