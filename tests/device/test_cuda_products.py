"""The CUDA products and rotations against the reference, on a GPU.

Tolerance of a product: x' is rounded to float16 (relative 2^-11 per value) and so are table entries (2^-11); the errors
are independent over K terms, so relative to the norm of the result they stay near sqrt(2) 2^-11 / sqrt(3) = 4e-4, plus
the rounding of the result: 2^-11 / sqrt(3) for float16, 2^-8 / sqrt(3) for bfloat16. Twice their sum is allowed.
"""

import pytest
import torch

from qpalette.backends.cuda.probe import random_member
from qpalette.backends.cuda.rotate import rotate
from qpalette.backends.cuda.unpack import multiply_by_library
from qpalette.rotate import Rotation, full_rotation, unpack_signs
from qpalette.runtime import PackedLinear, backends

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float16: 2 * (4e-4 + 2**-11 / 3**0.5), torch.bfloat16: 2 * (4e-4 + 2**-8 / 3**0.5)}
SPECS = [
    *("tcq-1", "tcq-1.125", "tcq-2.375-L18", "tcq-3.25", "tcq-4.5", "tcq-5.125", "tcq-8", "tcq-2-L12"),
    *("tcq2-1", "tcq2-1.125-L20", "tcq2-2", "tcq2-3.25", "tcq2-4", "tcq2-5", "tcq2-2.125-L12", "tcq2-3.25-L18"),
    *("vq-1.5", "vq-3", "vq-6", "nuq-2", "nuq-3", "nuq-5", "nuq-6", "nuq-7", "nuq-8"),
]
SHAPES = [
    (48, 576, 1),
    (320, 2880, 3),
    (1000, 5376, 8),
    (2064, 18944, 16),
    (64, 250, 17),
    (4096, 1024, 5),
    (20000, 256, 12),
    (1000, 5120, 1),
]


def members(specs: list[str], rows: list[int], columns: int) -> list[PackedLinear]:
    """Random codes, scales and signs; rows and columns that are no multiples of 16 among them."""
    device = torch.device("cuda")
    found = [random_member(spec, m, columns, device) for spec, m in zip(specs, rows, strict=True)]
    signs = torch.randint(0, 256, (columns // 8,), device=device).to(torch.uint8)
    tail = torch.randint(0, 1 << columns % 8, (1,), device=device).to(torch.uint8) if columns % 8 else signs[:0]
    for member in found:
        member.diagonal = torch.cat([signs, tail])
        member.scales = (torch.rand(member.out_features, device=device) + 0.5).half().view(torch.int16)
    return found


def expected(x: torch.Tensor, found: list[PackedLinear]) -> torch.Tensor:
    """float64, from the exact weights."""
    cuda, columns = backends()["cuda"], x.shape[1]
    rotated = Rotation.parse(found[0].rotation, columns).apply(x.double() * unpack_signs(found[0].diagonal, columns))
    return torch.cat([rotated @ cuda.rotated_weight(member).double().T for member in found], dim=1)


def place(columns: int) -> torch.Tensor:
    """Where the columns of W' lie in the order of a product's fragments."""
    k = torch.arange(columns)
    return k // 32 * 32 + k % 8 // 2 * 8 + k % 32 // 16 * 4 + k % 16 // 8 * 2 + k % 2


def check(specs: list[str], rows: list[int], columns: int, batch: int, dtype: torch.dtype) -> None:
    found = members(specs, rows, columns)
    x = torch.randn(batch, columns, device="cuda").to(dtype)
    result, wanted = backends()["cuda"].linears(x, found), expected(x, found)
    assert result.dtype == dtype
    assert result.shape == wanted.shape
    assert (result.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    assert torch.equal(result, backends()["cuda"].linears(x, found)), "the same bits on every run"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_reference(spec: str, shape: tuple[int, int, int]) -> None:
    rows, columns, batch = shape
    check([spec], [rows], columns, batch, torch.bfloat16 if rows % 3 else torch.float16)


@pytest.mark.parametrize("batch", [1, 7, 16, 40, 100])
def test_segments_of_different_specs(batch: int) -> None:
    check(["tcq2-3.25", "vq-3", "tcq-2.125"], [4096, 1024, 1000], 4096, batch, torch.float16)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("spec", ["tcq2-3.25", "tcq-2.125", "vq-3", "nuq-8"])
def test_products_by_the_library(spec: str, dtype: torch.dtype) -> None:
    found = members([spec, "nuq-4"], [1000, 48], 576)
    x = torch.randn(33, 576, device="cuda").to(dtype)
    result = multiply_by_library(rotate(x, found[0].diagonal, found[0].rotation, None), found, dtype)
    wanted = expected(x, found)
    # The product is rounded to float16 once more.
    assert (result.double() - wanted).norm() <= (TOLERANCE[dtype] + 2 * 2**-11 / 3**0.5) * wanted.norm()


def test_more_segments_than_a_launch_takes() -> None:
    check(["tcq2-3.25"] * 10, [256] * 10, 1024, 2, torch.bfloat16)


def test_codes_come_back_from_the_layout() -> None:
    cuda = backends()["cuda"]
    codes = torch.randint(-(2**31), 2**31, (3, 37, 27), device="cuda").to(torch.int32)
    assert torch.equal(cuda.from_layout(cuda.to_layout(codes), (3, 37, 27)), codes)


def test_large_and_small_inputs_do_not_leave_float16() -> None:
    found = members(["tcq2-3.25"], [256], 1024)
    for size in (1e-6, 1e4, 1e15):
        x = torch.randn(2, 1024, device="cuda") * size
        result, wanted = backends()["cuda"].linears(x, found).double(), expected(x, found)
        assert (result - wanted).norm() <= TOLERANCE[torch.float16] * wanted.norm()
    assert not backends()["cuda"].linears(torch.zeros(2, 1024, device="cuda"), found).any()


def test_a_token_that_is_not_finite_stays_so_and_alone() -> None:
    found = members(["tcq2-3.25"], [256], 1024)
    x = torch.randn(4, 1024, device="cuda")
    clean = backends()["cuda"].linears(x, found)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    result = backends()["cuda"].linears(x, found)
    assert torch.equal(result[[0, 3]], clean[[0, 3]])
    assert result[1:3].isnan().all()


@pytest.mark.parametrize("columns", [576, 1536, 2880, 4096, 5376, 11008, 14336, 17920, 18944])
def test_block_and_full_rotations(columns: int) -> None:
    for name in (full_rotation(columns).name, "h64"):
        found = members(["nuq-4"], [64], columns)
        found[0].rotation = name
        x = torch.randn(3, columns, device="cuda", dtype=torch.float16)
        result, wanted = backends()["cuda"].linears(x, found).double(), expected(x, found)
        assert (result - wanted).norm() <= TOLERANCE[torch.float16] * wanted.norm()


@pytest.mark.parametrize("columns", [576, 4096, 14336])
@pytest.mark.parametrize("name", ["full", "h64"])
def test_rms_norm_before_the_rotation(columns: int, name: str) -> None:
    rotation = full_rotation(columns).name if name == "full" else name
    signs = torch.randint(0, 256, (columns // 8,), device="cuda").to(torch.uint8)
    x, weight = torch.randn(3, columns, device="cuda").half() * 5, torch.rand(columns, device="cuda").half() + 0.5
    found = rotate(x, signs, rotation, None, norm=(weight, 1e-5))
    normed = torch.nn.functional.rms_norm(x.double(), (columns,), weight.double(), 1e-5)
    wanted = Rotation.parse(rotation, columns).apply(normed * unpack_signs(signs, columns))
    result = found.values[:, place(columns)].double() * found.scales[:, None].double()
    assert (result - wanted).norm() <= TOLERANCE[torch.float16] * wanted.norm()
