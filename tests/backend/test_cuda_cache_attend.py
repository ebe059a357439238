"""Attention over a cache of codes on a GPU, compiled for this machine (`emulated_cuda.py`), against softmax over what
the definition reads; tests/device has more shapes, and the real instructions.

Tolerance: as in tests/device/test_cuda_cache.py, whose roundings these are, but sums are exact here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cache_transforms import transform_of
from emulated_cuda import COMPILER, emulated_caches
from qpalette.backends.cuda import coded
from qpalette.backends.cuda.segments import DeviceLimits
from qpalette.backends.cuda.streams import CudaStream
from qpalette.kvcache import Exact, Stream, VectorFormat, parse_code

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CPU, SCALE = torch.device("cpu"), 0.6
CASES = [  # codes of keys and values, their widths, (batch, key heads, queries of each), tokens, length, processors
    ("nuq-3", "nuq-3", 64, 64, (1, 2, 4), 700, 720, 2),
    ("vq-2.5", "vq-2.5", 64, 64, (2, 2, 3), 200, 256, 8),
    ("vq4-2", "vq4-2", 128, 128, (1, 1, 7), 257, 300, 132),
    ("nuq-4", "vq-3", 64, 64, (1, 1, 1), 130, 130, 132),
    ("nuq-7", "nuq-5", 80, 64, (1, 1, 8), 170, 192, 1),
    ("vq-3", "vq-4", 256, 256, (1, 1, 5), 150, 150, 132),
    ("vq4-1.25", "nuq-2", 96, 80, (1, 1, 20), 65, 128, 1),
]


@pytest.fixture(scope="module", autouse=True)
def on_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with emulated_caches(tmp_path_factory.mktemp("kernels")):
        yield


def written(name: str, dim: int, kind: str, shape: tuple[int, int, int], exact: Exact) -> CudaStream:
    format = VectorFormat(parse_code(name), dim, kind != "white")
    return CudaStream(format, transform_of(kind, shape[1], dim), exact, shape, torch.float16, CPU)


def vectors(batch: int, heads: int, count: int, dim: int, seed: int) -> Tensor:
    return (torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(seed)) * 3).half()


def masks(batch: int, length: int, count: int, starts: Tensor) -> dict[str, Tensor]:
    place = torch.arange(length)
    seen = (place < count)[None, None, None].repeat(batch, 1, 1, 1)
    padded = seen & (place >= starts[:, None, None, None])
    return {
        "one": seen[:1],
        "padded": padded,
        "holes": padded & (place % 7 != 3),
        "window": padded & (place > count - 20),
    }


@pytest.mark.parametrize("exact", [Exact(0, 0), Exact(4, 40)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_codes(case: tuple, exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    key_code, value_code, key_dim, value_dim, (batch, heads, rows), count, length, processors = case
    monkeypatch.setattr(coded, "limits_of", lambda device: DeviceLimits(processors, 227 << 10, (9, 0)))
    starts = 17 * torch.arange(batch)
    keys = written(key_code, key_dim, "fed back", (batch, heads, length), exact)
    values = written(value_code, value_dim, "white", (batch, heads, length), exact)
    for seed, stream in enumerate((keys, values)):
        Stream.write(stream, vectors(batch, heads, count, stream.format.dim, seed), torch.arange(count), starts)
    query = vectors(batch, heads, rows, key_dim, 9) / (3 * key_dim**0.5)
    given = (torch.tensor(count), starts)
    k, v = (Stream.read(stream, *given).double() for stream in (keys, values))
    turned, y = query.float() @ keys.transform.inverse, keys.transform.apply(k.float())
    terms = float((turned.square() @ y.square().mT).sqrt().max()) * SCALE
    bound = 2 * ((2 * terms**2 + 2) * 2.0**-22 / 3 + 2.0**-20 / 12) ** 0.5
    for name, mask in masks(batch, length, count, starts).items():
        wanted = (query.double() @ k.mT * SCALE).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        found = keys.attend(values, query, mask, *given, SCALE)
        assert found is not None
        assert found.shape == wanted.shape
        assert (found.double() - wanted).norm() <= bound * wanted.norm(), name
        assert not keys._arrived.any()


def test_what_sees_nothing_and_values_that_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "limits_of", lambda device: DeviceLimits(132, 227 << 10, (9, 0)))
    keys, values = (written("nuq-3", 64, "white", (2, 1, 100), Exact(0, 0)) for _ in range(2))
    starts, x = torch.zeros(2, dtype=torch.int64), vectors(2, 1, 90, 64, 0)
    Stream.write(keys, x, torch.arange(90), starts)
    Stream.write(values, torch.zeros_like(x), torch.arange(90), starts)
    mask = masks(2, 100, 90, starts)["padded"]
    mask[1] = False
    found = keys.attend(values, vectors(2, 1, 4, 64, 1), mask, torch.tensor(90), starts, 0.1)
    assert found is not None
    assert not found.any()
