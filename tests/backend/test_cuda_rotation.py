"""Rotations on a GPU, compiled for this machine (`emulated_cuda.py`), against the definition: few tokens and many.

A value is rounded to 16 bits once, relatively by at most UNIT, and in the mean over many by UNIT / sqrt(3). Before, a
sum in float32 is rounded where an instruction ends, or with each of A's factors, and in each butterfly, by at most
2^-24 of what it can be, which is the norm; so is what A's pieces leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from emulated_cuda import COMPILER, SHARED_BYTES, emulated
from qpalette.backends.cuda import rotate, rotate_many
from qpalette.rotate import Rotation, pack_signs

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
LEAST = 2**-25  # of float16, half of its last bit
ROUNDINGS = 192  # more than there are in any of these


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return {"folder": tmp_path_factory.mktemp("kernels")}


@pytest.fixture(autouse=True)
def names(kernels: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the kernels that are started, on this machine."""
    started: list[str] = []

    class Launch:
        def __init__(self, kernel: Any, grid: tuple[int, int], threads: int, shared_bytes: int,
                     arguments: Sequence[Any], overlap: bool) -> None:  # fmt: skip
            source, name, macros = kernel
            key = (name, *sorted(macros.items()))
            if key not in kernels:
                kernels[key] = emulated(kernels["folder"], source, name, macros, threads)
            assert shared_bytes <= SHARED_BYTES
            self.name, self.kernel, self.arguments, self.grid = name, kernels[key], arguments, grid

        def start(self, stream: int) -> None:
            started.append(self.name)
            self.kernel(self.arguments, self.grid[:2])

    monkeypatch.setattr(rotate, "load_kernel", lambda source, name, macros, *_: (source, name, macros))
    monkeypatch.setattr(rotate, "KernelLaunch", Launch)
    return started


def run(
    x: torch.Tensor, signs: torch.Tensor, name: str, batch: int | None = None, cores: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x' [tokens, K], in the order of the definition and without its divisors, and these."""
    tokens, inputs = x.shape
    padded, columns = rotate.padded_columns(inputs), -(-tokens // (batch or 1)) * (batch or 1)
    values = torch.full((columns * padded,), 7.0).to(rotate.type_of_values(x.dtype, batch))
    scales, zeros = torch.full((columns,), 7.0), torch.ones(40)
    options: dict[str, Any] = {"overlap": False, "cores": cores, "zero_bytes": 128}
    launch = rotate.RotationLaunch(name, pack_signs(signs), inputs, tokens, batch, x.dtype, **options)
    launch.start(tokens, x.data_ptr(), values.data_ptr(), scales.data_ptr(), 0, zeros=zeros.data_ptr())
    assert torch.equal(zeros, (torch.arange(40) >= 32).float())
    found = values[places(padded, columns, batch or 1, cores)][:tokens]
    assert (found[:, inputs:] == 0).all()
    return found[:, :inputs].double() * scales[:tokens, None], scales[:tokens]


def places(padded: int, tokens: int, batch: int, cores: bool) -> torch.Tensor:
    """Where each token's inputs lie: int64 [tokens, padded]."""
    order = torch.arange(tokens * padded).view(tokens // batch, padded // 32, -1, min(batch, 8) * 32)
    eights = order.unflatten(3, (4, -1, 8) if cores else (-1, 4, 2, 2, 2))
    if cores:  # [lot][32 inputs][eight tokens][eight inputs][token][input]
        return eights.permute(0, 2, 4, 1, 3, 5).reshape(tokens, padded)
    # [lot][32 inputs][eight tokens][token][lane][half of the 32][eight of it][one of two]
    return eights.permute(0, 2, 3, 1, 5, 6, 4, 7).reshape(tokens, padded)


def check(
    name: str, dtype: torch.dtype, tokens: int, batch: int | None = None, cores: bool = False, size: float = 1.0
) -> None:
    inputs = math.prod(int(factor[1:]) for factor in name.split("x"))
    generator = torch.Generator().manual_seed(inputs + tokens)
    x = (torch.randn(tokens, inputs, generator=generator) * size).to(dtype)
    x[1], x[2, inputs // 3] = 0, x[2, inputs // 3] * 50
    signs = torch.randint(0, 2, (inputs,), generator=generator) * 2 - 1
    found, scales = run(x, signs, name, batch, cores)
    wanted, norm = Rotation.parse(name, inputs).apply(x.double() * signs), x.double().norm(dim=1)
    unit = UNIT[rotate.type_of_values(dtype, batch)]
    allowed = unit * wanted.abs() + (ROUNDINGS * 2**-24 * norm + LEAST * scales)[:, None]
    assert ((found - wanted).abs() <= allowed).all()
    assert ((found - wanted).norm(dim=1) <= unit / 3**0.5 * norm).all()
    power = torch.where(norm > 0, 2.0 ** torch.frexp(norm).exponent, 2.0) / 128
    as_it_is = (norm >= 1 / 16) & (norm < 32768) | (dtype == torch.bfloat16)
    assert torch.equal(scales.double(), torch.where(as_it_is, 1.0, power) if batch is None else power)


# A of one tile of rows, of two, and of more, evenly or not; H of every kind; cosines, A of several pieces.
SHAPES = ["h28xh512", "h20xh256", "h12xh128", "h76xh64", "h28xh32", "h44xh32", "h12xh2048", "c43xh32", "h148xh128"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_many_tokens(name: str, dtype: torch.dtype, names: list[str]) -> None:
    check(name, dtype, 17)
    assert names == ["rotate_many"]


@pytest.mark.parametrize(("batch", "cores"), [(24, False), (32, False), (48, True), (64, True), (128, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_tokens_in_every_layout(batch: int, cores: bool, dtype: torch.dtype, names: list[str]) -> None:
    check("h28xh64", dtype, batch + 5, batch, cores)
    check("h20xh32", dtype, 19, batch, cores)
    assert names == ["rotate_many"] * 2


@pytest.mark.parametrize(("tokens", "batch"), [(3, None), (3, 8), (16, 16), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_few_tokens(tokens: int, batch: int | None, dtype: torch.dtype, names: list[str]) -> None:
    check("h28xh64", dtype, tokens, batch)
    check("c125xh2", dtype, tokens, batch)
    assert names == ["rotate"] * 2


@pytest.mark.parametrize("cores", [False, True])
def test_a_token_is_the_same_bits_however_it_is_cut(cores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, signs = torch.randn(17, 76 * 64).half(), torch.ones(76 * 64)
    wanted = run(x, signs, "h76xh64", 48 if cores else None, cores)
    for tiles, groups in ((1, 1), (1, 3), (2, 1), (2, 3)):
        cut = rotate_many.cut_into(76, 6, tiles, groups)
        monkeypatch.setattr(rotate, "tile_cut", lambda *_, cut=cut: cut)
        assert all(map(torch.equal, run(x, signs, "h76xh64", 48 if cores else None, cores), wanted))


@pytest.mark.parametrize("size", [1e-5, 1.0, 500.0])
@pytest.mark.parametrize("batch", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tokens_of_any_size(size: float, batch: int | None, dtype: torch.dtype) -> None:
    for tokens in (17, 3):
        check("h28xh64", dtype, tokens, batch, size=size)


@pytest.mark.parametrize("tokens", [3, 17])
def test_what_is_not_finite_stays_in_its_token(tokens: int) -> None:
    x = torch.randn(tokens, 28 * 64).half()
    clean, _ = run(x, torch.ones(28 * 64), "h28xh64", 32)
    x[0, 5], x[2, 1700] = torch.nan, torch.inf
    found, scales = run(x, torch.ones(28 * 64), "h28xh64", 32)
    assert scales[[0, 2]].isnan().all()
    assert torch.equal(found[[1, *range(3, tokens)]], clean[[1, *range(3, tokens)]])


def test_a_hadamard_matrix_is_one_of_ones_in_any_type() -> None:
    split = rotate.split_rotation("h28xh64", 28 * 64, CPU)
    for dtype in UNIT:
        pieces = rotate_many.pieces_of(split.dense.T, dtype)
        assert pieces.count == 1
        assert (pieces.values.abs() == 1).sum() == 28 * 28
        assert pieces.unit == pytest.approx((28 * 64) ** -0.5)


@pytest.mark.parametrize("tokens", [17, 33, 64, 128, 256, 1 << 16])
@pytest.mark.parametrize(("order", "log_h"), [(5, 5), (12, 10), (28, 9), (148, 7), (924, 5), (1020, 5)])
def test_a_token_is_cut_into_all_of_its_rows(order: int, log_h: int, tokens: int) -> None:
    cut = rotate_many.tile_cut(order, log_h, tokens)
    rows = rotate_many.TILE * cut.tiles * cut.groups
    assert (cut.blocks - 1) * rows < order <= cut.blocks * rows
    assert cut.threads <= rotate_many.MOST_THREADS
    assert 4 * min(rows, order) << log_h <= cut.shared_bytes <= rotate_many.MOST_SHARED_BYTES
