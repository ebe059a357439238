"""What writes a cache of codes on a GPU, compiled for this machine (`emulated_cuda.py`): bytes are those of the
definition, of every family, for few tokens and for many; tests/device has every code.

Whole numbers and a Hadamard matrix of order 4^n leave nothing to rounding before a unit is compared; a scale may be
within rounding of the middle between two bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cache_transforms import transform_of
from emulated_cuda import COMPILER, emulated_caches
from qpalette.backends.cuda import coded
from qpalette.backends.cuda.streams import CudaStream
from qpalette.kvcache import CacheCode, Exact, Stream, Transform, VectorFormat, cache_palette, parse_code, white
from qpalette.kvcache.codes import nearest

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
NONE = Exact(0, 0)


@pytest.fixture(scope="module", autouse=True)
def on_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with emulated_caches(tmp_path_factory.mktemp("kernels")):
        yield


def both(
    name: str, dim: int, shape: tuple[int, int, int], kind: str = "white", exact: Exact = NONE, unbiased: bool = True
) -> tuple[Stream, Stream]:
    """The definition, and the kernels."""
    format, transform = VectorFormat(parse_code(name), dim, unbiased), transform_of(kind, shape[1], dim)
    given = (format, transform, exact, shape, torch.float16, CPU)
    return Stream(*given), CudaStream(*given)


def vectors(batch: int, heads: int, count: int, dim: int) -> Tensor:
    return (torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(0)) * 3).half()


def write(stream: Stream, x: Tensor, start: int = 0, starts: tuple[int, ...] = (0, 0)) -> None:
    stream.write(x, torch.arange(start, start + x.shape[2]), torch.tensor(starts))


def assert_alike(plain: Stream, mine: Stream) -> None:
    assert torch.equal(plain.codes, mine.codes)
    assert all(torch.equal(a, b) for a, b in zip(plain.memory[1:], mine.memory[1:], strict=True))
    apart = (plain.scales.int() - mine.scales.int()).abs()
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 0.01


@pytest.mark.parametrize("name", ["nuq-2", "nuq-3", "nuq-8", "vq-1.5", "vq-2.5", "vq4-1.25", "vq4-2"])
def test_bytes_are_those_of_the_definition(name: str) -> None:
    plain, mine = both(name, 64, (2, 2, 60))
    x = vectors(2, 2, 50, 64).round()
    x[0, 0, 3], x[1, 1, 40] = 0, torch.inf
    x[0, 1, 5, 6], x[1, 1, 49, 63] = torch.nan, -torch.inf
    for stream in (plain, mine):
        for first, last in pairwise((0, 1, 3, 30, 50)):
            write(stream, x[:, :, first:last], first)
    assert_alike(plain, mine)


@pytest.mark.parametrize(("count", "exact", "starts"), [(17, NONE, (0, 0)), (140, Exact(3, 20), (2, 70))], ids=str)
def test_tokens_over_the_borders_of_warps_blocks_and_pages(count: int, exact: Exact, starts: tuple[int, int]) -> None:
    plain, mine = both("nuq-4", 16, (2, 3, 200), exact=exact, unbiased=False)
    for stream in (plain, mine):
        write(stream, vectors(2, 3, count, 16).round(), 55, starts)
    assert_alike(plain, mine)


@pytest.mark.parametrize("code", [code for code in cache_palette() if code.width == 1], ids=lambda code: code.name)
def test_borders_are_where_the_definition_changes_its_mind(code: CacheCode) -> None:
    points = code.points(CPU)
    found, borders = coded.points_of(code.name, CPU).split(len(points))
    assert torch.equal(found, points[:, 0])
    assert (points[1:] > points[:-1]).all()
    borders, number = borders[:-1], torch.arange(len(points) - 1)
    assert torch.equal(nearest(borders[:, None], points)[:, 0], number + 1)
    assert torch.equal(nearest(borders.nextafter(points[:-1, 0])[:, None], points)[:, 0], number)


@pytest.mark.parametrize("gain", [1e-2, 1e-5])
def test_numbers_far_beyond_all_points(gain: float) -> None:
    """Where several points are equally near, as differences are rounded, the first counts."""
    plain, mine = both("nuq-4", 16, (1, 2, 20), "fed back")
    for stream in (plain, mine):
        shaping = (torch.zeros(2, 16, 16), torch.full((2,), gain))
        stream.transform = Transform(white(16).matrix, white(16).inverse, torch.zeros(1, 16), *shaping)
    mine = CudaStream(mine.format, mine.transform, NONE, (1, 2, 20), torch.float16, CPU)
    for stream in (plain, mine):
        write(stream, vectors(1, 2, 20, 16).round(), 0, (0,))
    assert torch.equal(plain.codes, mine.codes)


def test_what_has_no_room_is_left_out() -> None:
    _, mine = both("nuq-2", 16, (1, 2, 20))
    write(mine, vectors(1, 2, 20, 16), 0, (0,))
    before = [memory.clone() for memory in mine.memory]
    write(mine, vectors(1, 2, 15, 16) + 1, 20, (0,))
    assert all(torch.equal(a, b) for a, b in zip(before, mine.memory, strict=True))


@pytest.mark.parametrize(
    ("name", "dim"), [("nuq-3", 128), ("nuq-7", 24), ("vq-2.5", 96), ("vq4-2", 64), ("vq4-1.75", 80), ("vq-2", 256)]
)
def test_keys_with_errors_fed_back(name: str, dim: int) -> None:
    """Coordinates summed in another order change an index where two points are equally near, seldom, and what is fed
    back after it."""
    count = 20
    plain, mine = both(name, dim, (1, 2, 60), "fed back")
    x = vectors(1, 2, count, dim)
    write(plain, x, 0, (0,))
    write(mine, x, 0, (0,))
    write(mine, x[:, :, :2], count, (0,))
    assert torch.equal(mine.codes[:, :, 0, count : count + 2], mine.codes[:, :, 0, :2]), "as it is with others"
    differ = (plain.codes != mine.codes)[:, :, 0, :count].any(-1)
    assert differ.float().mean() <= 0.05
    assert differ.logical_not().any()


def test_a_slice_is_written_as_a_copy_of_it_is() -> None:
    """Whose vectors lie where no sixteen bytes begin."""
    x = vectors(1, 2, 20, 32)
    wide = torch.zeros(1, 20, 2, 37).half()
    wide[..., 3:35] = x.transpose(1, 2)
    plain, mine = both("vq-3", 32, (1, 2, 30))[1], both("vq-3", 32, (1, 2, 30))[1]
    write(plain, x, 0, (0,))
    write(mine, wide[..., 3:35].transpose(1, 2), 0, (0,))
    assert torch.equal(plain.pages, mine.pages)
