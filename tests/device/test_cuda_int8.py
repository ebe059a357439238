"""Prompts as int8 on a GPU: from rotated tokens on the same bits as the definition, `runtime/prefill.py`.

Rotated tokens themselves are rounded to float16 or bfloat16 here: a number of theirs may be another whole one than the
definition's, by one step at most where it was near a half.
"""

from __future__ import annotations

import pytest
import torch
from test_cuda_products import SPECS, as_stored, check_captured, diagonal_of, expected, members, place, with_diagonal

from qpalette.backends.cuda import int8, library
from qpalette.backends.cuda.product import CudaProduct
from qpalette.backends.cuda.rotate import rotate
from qpalette.core.environment import PREFILL
from qpalette.rotate import Rotation
from qpalette.runtime import INT8, PackedLinear, backends, prefill_by
from qpalette.runtime.prefill import FLOAT, Whole, product_in_int8, table_step, tokens_in_int8, weights_in_int8

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFILL, INT8)


def defined(x: torch.Tensor, found: list[PackedLinear]) -> torch.Tensor:
    """By the definition, of tokens that the kernel of this device has rotated."""
    columns, cuda = x.shape[1], backends()["cuda"]
    rotated = rotate(x, found[0].diagonal, found[0].rotation, None)
    tokens = tokens_in_int8(rotated.values[:, place(columns)])
    tokens = Whole(tokens.numbers, tokens.steps * rotated.scales[:, None])
    results = []
    for member in found:
        ones = torch.ones_like(member.scales, dtype=torch.float16).view(torch.int16)
        weights = weights_in_int8(cuda.rotated_weight(member.with_(scales=ones)), member.spec)
        results.append(product_in_int8(tokens, weights, member.scales.view(torch.float16).float()))
    return torch.cat(results, dim=1).to(x.dtype)


def check(specs: list[str], rows: list[int], columns: int, tokens: int, dtype: torch.dtype) -> None:
    found = members(specs, rows, columns)
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    wanted, result = defined(x, found), backends()["cuda"].linears(x, found)
    assert result.dtype == dtype
    assert torch.equal(result, wanted)
    assert torch.equal(torch.cat(CudaProduct(found)(x), dim=1), wanted), "the same bits apart"
    check_against_exact(x, found, result)


def check_against_exact(x: torch.Tensor, found: list[PackedLinear], result: torch.Tensor) -> None:
    """By the bound of tests/backend/test_int8_prompts.py, and what rounds tokens and results to 16 bits: 2^-11 or 2^-8
    of each, over sqrt(3), and twice that."""
    columns, wanted = x.shape[1], expected(x, found)
    tokens = Rotation.parse(found[0].rotation, columns).apply(x.double() * diagonal_of(found[0], columns))
    of_tokens = float((tokens.abs().amax(1) / 127).square().sum())
    square = 0.0
    for member in found:
        weight = backends()["cuda"].rotated_weight(member).double()
        of_weights = table_step(member.spec) * member.scales.view(torch.float16).double()
        square += of_tokens * float(weight.square().sum())
        square += float(of_weights.square().sum() * tokens.square().sum())
    unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-11}[x.dtype]
    rounded = 2 * (2 / 3) ** 0.5 * unit * float(wanted.norm())
    assert float((result.double() - wanted).norm()) <= 1.1 * (square / 12 * (1 + 1 / 127)) ** 0.5 + rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("specs", [["tcq2-3.25", "nuq-4"], ["tcq-2.125"], ["vq-3", "tcq-3.25"], ["nuq-8"]], ids=str)
@pytest.mark.parametrize("shape", [(1000, 576, 149), (48, 250, 164), (2064, 4096, 1000), (200, 14336, 177)], ids=str)
def test_products_have_the_bits_of_the_definition(
    specs: list[str], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, columns, tokens = shape
    check(specs, [rows, 333][: len(specs)], columns, tokens, dtype)


@pytest.mark.parametrize("spec", SPECS[::3])
def test_every_family_and_rate(spec: str) -> None:
    check([spec], [112], 512, 130, torch.float16)


@pytest.mark.parametrize("drawn", range(6))
def test_shapes_drawn_at_random(drawn: int) -> None:
    generator = torch.Generator().manual_seed(drawn)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    check(["tcq2-3.25", "nuq-3"], [number(1, 700), number(1, 700)], 2 * number(2, 700), number(129, 400), torch.float16)


def test_slabs_and_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    specs, rows = ["tcq2-3.25", "nuq-4", "vq-3", "tcq-2.125"], [1000, 48, 32, 500]
    monkeypatch.setattr(library, "SLAB_BYTES", 300 * 1024)
    monkeypatch.setattr(int8, "MOST_SUMS", 64 * 170)
    check(specs, rows, 1000, 170, torch.float16)


def test_a_few_tokens_are_multiplied_as_ever() -> None:
    found, x = members(["tcq2-3.25"], [256], 1024), torch.randn(128, 1024, device="cuda").half()
    result = backends()["cuda"].linears(x, found)
    with prefill_by(FLOAT):
        assert torch.equal(result, backends()["cuda"].linears(x, found))


def test_a_prepared_product_takes_the_road_that_is_asked_for_then() -> None:
    found, x = members(["tcq2-3.25"], [256], 1024), torch.randn(150, 1024, device="cuda").half()
    prepared = CudaProduct(found)
    (first,) = prepared(x)
    with prefill_by(FLOAT):
        (second,) = prepared(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, prepared(x)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_small_and_no_inputs(dtype: torch.dtype) -> None:
    found = members(["tcq2-3.25", "nuq-4"], [256, 48], 1024)
    for size in (1e-6, 1.0, 1e2) if dtype == torch.float16 else (1e-15, 1e4, 1e15):
        x = (torch.randn(160, 1024, device="cuda") * size).to(dtype)
        x[0] *= 1e-2
        x[1] = 0
        result = backends()["cuda"].linears(x, found)
        assert torch.equal(result, defined(x, found))
        assert not result[1].any()


def test_a_token_that_is_not_finite_stays_so_and_alone() -> None:
    found, x = members(["tcq2-3.25"], [256], 1024), torch.randn(160, 1024, device="cuda")
    clean = backends()["cuda"].linears(x, found)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    result = backends()["cuda"].linears(x, found)
    assert torch.equal(result[[0, *range(3, 160)]], clean[[0, *range(3, 160)]])
    assert result[1:3].isnan().all()


def test_a_diagonal_of_float16_values() -> None:
    found = members(["nuq-4", "tcq2-3.25"], [64, 100], 2880)
    with_diagonal(found, torch.randn(2880, device="cuda") * torch.logspace(-2, 2, 2880, device="cuda"))
    x = torch.randn(200, 2880, device="cuda").half()
    assert torch.equal(backends()["cuda"].linears(x, found), defined(x, found))


def test_stored_codes_give_the_same_bits() -> None:
    cuda, found = backends()["cuda"], members(["tcq2-3.25", "nuq-4"], [1000, 48], 1040)
    x = torch.randn(150, 1040, device="cuda").half()
    assert torch.equal(cuda.linears(x, [as_stored(member) for member in found]), cuda.linears(x, found))


def test_a_captured_product_replays_with_what_is_there_then() -> None:
    check_captured(torch.randn(160, 1024, device="cuda").half())
