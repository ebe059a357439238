from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qpalette.core.errors import SpecError
from qpalette.rotate import (
    Factor,
    Rotation,
    block_rotation,
    full_rotation,
    random_signs,
    rotate_weight,
    rotation_for,
    unrotate_weight,
)
from tolerance import check_float32

EPS = torch.finfo(torch.float32).eps

# Input dimensions of the models people quantize that are not powers of two.
DIMS = [
    48, 576, 704, 768, 960, 1408, 1536, 1792, 1856, 2112, 2304, 2560, 2688, 2816, 2880, 3072, 3584, 3712, 3840, 4544,
    4608, 4864, 5120, 5376, 6144, 6656, 6912, 7168, 7680, 9728, 10240, 10304, 10944, 11008, 11264, 12288, 13312, 13696,
    14336, 15360, 17408, 17920, 18176, 18432, 18944, 19968, 21504, 24576, 25600, 27392, 27648, 28672, 29568,
]  # fmt: skip
SMALL_DIMS = [2, 3, 4, 5, 6, 7, 9, 12, 14, 20, 24, 30, 48, 64, 96, 107, 214, 576]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def kurtosis(x):
    return float((x**4).mean() / (x**2).mean() ** 2)


def terms(rotation):
    """Of the sums of each factor."""
    return sum(factor.order for factor in rotation.factors)


@pytest.mark.parametrize("dim", DIMS)
def test_every_dimension_in_use_has_a_full_rotation(dim):
    rotation = full_rotation(dim)
    assert rotation.block == dim
    assert Rotation.parse(rotation.name, dim) == rotation
    for piece in (piece for factor in rotation.factors for piece in factor.pieces()):
        matrix = torch.from_numpy(piece.matrix())
        identity = torch.eye(piece.order, dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)
    x = normal(2, dim)
    rotated = rotation.apply(x)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
    check_float32(rotation.inverse(rotated), lambda x: x.double(), (x,), 2 * terms(rotation))
    check_float32(rotated, lambda x: rotation.apply(x.double()), (x,), terms(rotation))


@pytest.mark.parametrize(
    ("dim", "name"),
    [
        (2, "h2"),
        (4096, "h4096"),
        (3, "c3"),
        (107, "c107"),
        (6, "c3xh2"),
        (12, "h12"),
        (576, "h36xh16"),
        (14336, "h28xh512"),
        (2880, "h180xh16"),
        (13696, "c107xh128"),
        (25600, "h200xh128"),
        (29568, "h924xh32"),
        (10944, "h684xh16"),
        (3712, "h464xh8"),
    ],
)
def test_names_of_full_rotations(dim, name):
    assert full_rotation(dim).name == name


@pytest.mark.parametrize("dim", SMALL_DIMS)
def test_apply_is_the_dense_matrix(dim):
    for rotation in {full_rotation(dim), block_rotation(dim) if dim % 2 == 0 else full_rotation(dim)}:
        x, dense = normal(3, 2, dim, dtype=torch.float64), rotation.matrix()
        torch.testing.assert_close(dense @ dense.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(rotation.apply(x), x @ dense.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(rotation.inverse(x), x @ dense, rtol=0, atol=1e-12)


def test_the_matrix_is_the_kronecker_product_of_the_named_factors_on_each_block():
    rotation = Rotation.parse("c3xh4xh2", 48)
    factors = [torch.from_numpy(Factor(kind, order).matrix()) for kind, order in [("c", 3), ("h", 4), ("h", 2)]]
    block = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    torch.testing.assert_close(rotation.matrix(), torch.block_diag(block, block))
    assert rotation.block == 24


def test_a_split_power_of_two_is_still_sylvester():
    assert len(Factor("h", 2048).pieces()) > 1
    x = torch.zeros(2048)
    x[5] = 1.0
    signs = [1 - 2 * (bin(5 & i).count("1") % 2) for i in range(2048)]
    torch.testing.assert_close(full_rotation(2048).apply(x), torch.tensor(signs) / 2048**0.5)


def test_a_large_odd_dimension_goes_through_the_fft():
    rotation = full_rotation(2062)
    assert rotation.name == "c1031xh2"
    x = normal(2, 2062, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ rotation.matrix().T, rtol=0, atol=1e-11)
    torch.testing.assert_close(rotation.inverse(rotation.apply(x)), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)])
def test_shape_and_type_are_kept(shape, dtype):
    x = normal(*shape).to(dtype)
    rotated = full_rotation(48).apply(x)
    assert (rotated.shape, rotated.dtype) == (x.shape, dtype)
    exact = x.double() @ full_rotation(48).matrix().T
    computing = 1e-14 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(rotated.double(), exact, rtol=torch.finfo(dtype).eps, atol=computing)


@pytest.mark.parametrize(
    "x", [torch.zeros(47), torch.zeros(48, 2), torch.tensor(0.0), torch.zeros(48, dtype=torch.int8)]
)
def test_wrong_input_is_named(x):
    with pytest.raises(ValueError, match="floating vectors of 48"):
        full_rotation(48).apply(x)


def test_gradients_flow_even_after_inference_mode():
    rotation = full_rotation(40)
    with torch.inference_mode():
        rotation.apply(torch.ones(40))
    x = normal(3, 40).requires_grad_()
    rotation.apply(x)[0, 0].backward()
    torch.testing.assert_close(x.grad[0], rotation.matrix()[0].float())


def test_a_tracer_leaves_nothing_fake_behind():
    rotation = full_rotation(80)
    for _ in range(2):  # the second time with the real matrices at hand
        with FakeTensorMode():
            assert rotation.apply(torch.ones(2, 80)).shape == (2, 80)
        assert float(rotation.apply(torch.ones(80)).norm()) == pytest.approx(80**0.5)


@pytest.mark.parametrize("name", ["h36xh16", "h64", "h2", "c9xh64", "c576", "h12xc3", "h72"])
def test_names_round_trip(name):
    assert Rotation.parse(name, 576).name == name


EMPTY = ["", "x", "h", "h16xx", "xh16", "h16x"]
NO_SUCH_FACTOR = ["h0", "c0", "h1", "c1", "h35", "h100", "h28", "h-4", "H16", "none", "hadamard"]
MISSPELT = ["h16 ", "h16\n", "h016", "h1_6", "h\uff14", "c\u00b2", "h64;c9"]
HUGE = ["h99999999999", "h" + "9" * 5000, "c999999999", "h536870912", "h2x" * 500 + "h2", "h2x" * 60 + "h2"]


@pytest.mark.parametrize("name", EMPTY + NO_SUCH_FACTOR + MISSPELT + HUGE)
def test_hostile_names_are_refused(name):
    with pytest.raises(SpecError):
        Rotation.parse(name, 576)


BOMBS = [("c65536", 1 << 16), ("h1024xh1024xh2", 1 << 21), ("c1022xc1022", 1022**2), ("c1024xh4xc3", 12 << 10)]


@pytest.mark.parametrize(("name", "dim"), BOMBS)
def test_names_that_ask_for_gigabytes_are_refused(name, dim):
    with pytest.raises(SpecError, match=r"4096 is the most|above 1024 a cosine"):
        Rotation.parse(name, dim)


@given(st.one_of(st.integers(2, 5000), st.integers(2, 1 << 20), st.integers(1, 1 << 10).map(lambda n: n << 10)))
@settings(max_examples=2000, deadline=None)
@example(1_048_573)  # a prime: one cosine, by FFT
@example((1 << 20) - 2)
def test_every_rotation_that_is_chosen_can_be_read(dim):
    for kind in ["full", *(["block"] if dim % 2 == 0 else [])]:
        rotation = rotation_for(dim, kind)
        assert Rotation.parse(rotation.name, dim) == rotation
        assert rotation.dense_order <= 1024


@pytest.mark.parametrize(("name", "dim"), [("h64", 100), ("c7", 0), ("h2", -2), ("h2", 1), ("c3xh2", 9)])
def test_blocks_that_do_not_divide_are_refused(name, dim):
    with pytest.raises(SpecError, match=f"do not divide {dim} inputs"):
        Rotation.parse(name, dim)


@pytest.mark.parametrize(
    ("dim", "kind", "name"),
    [
        (576, "full", "h36xh16"),
        (576, "block", "h64"),
        (576, "block-64", "h64"),
        (576, "block-16", "h16"),
        (4096, "block", "h4096"),
        (13696, "block", "h128"),
        (6, "block", "h2"),
    ],
)
def test_options(dim, kind, name):
    assert rotation_for(dim, kind).name == name


@pytest.mark.parametrize(
    ("dim", "kind", "advice"),
    [
        (107, "block", "use the full rotation"),
        (576, "block-128", "use block-64"),
        (576, "block-48", "must be a power of two"),
        (576, "block-1", "must be a power of two"),
        (576, "block-0", "is not a rotation option"),
        (576, "block-", "is not a rotation option"),
        (576, "none", "is not a rotation option"),
        (1, "full", "cannot be rotated"),
        (0, "block", "use the full rotation"),
    ],
)
def test_bad_options_say_the_way_out(dim, kind, advice):
    with pytest.raises(SpecError, match=advice):
        rotation_for(dim, kind)


@pytest.mark.parametrize(("dim", "kind"), [(576, "full"), (576, "block"), (704, "full"), (214, "full"), (107, "full")])
def test_a_rotated_linear_computes_the_same(dim, kind):
    rotation, signs = rotation_for(dim, kind), random_signs(dim, 3, "q_proj")
    weight, x = normal(32, dim, seed=1), normal(5, dim, seed=2)
    rotated = rotate_weight(weight, rotation, signs)
    matrix = torch.diag(signs.double()) @ rotation.matrix().T
    check_float32(rotated, lambda weight: weight.double() @ matrix, (weight,), terms(rotation) + 1)
    product, roundings = rotation.apply(signs * x) @ rotated.T, 2 * terms(rotation) + dim
    check_float32(product, lambda x, weight: x.double() @ weight.double().T, (x, weight), roundings)
    again = unrotate_weight(rotated, rotation, signs)
    check_float32(again, lambda weight: weight.double(), (weight,), 2 * terms(rotation))


def test_weights_are_rotated_by_chunks_as_at_once(monkeypatch):
    rotation, signs, weight = full_rotation(96), random_signs(96, 0, "w"), normal(37, 96).bfloat16()
    at_once = rotate_weight(weight, rotation, signs)
    monkeypatch.setattr("qpalette.rotate.weight._CHUNK", 500)
    torch.testing.assert_close(rotate_weight(weight, rotation, signs), at_once, rtol=0, atol=4 * EPS)
    assert at_once.dtype == torch.float32


def test_weights_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"\[M, 96\]"):
        rotate_weight(torch.zeros(3, 95), full_rotation(96), random_signs(96, 0, "w"))
    with pytest.raises(ValueError, match=r"signs \[96\]"):
        rotate_weight(torch.zeros(3, 96), full_rotation(96), random_signs(95, 0, "w"))


@pytest.mark.parametrize("dim", [576, 1024, 2 * 107])
def test_rotation_makes_outliers_gaussian(dim):
    rotation, signs = full_rotation(dim), random_signs(dim, 0, "w")
    weight = normal(64, dim)
    weight[7, 11] = 1.5 * dim**0.5  # about twice the energy of the rest of its row
    assert kurtosis(weight) > 10
    assert kurtosis(rotate_weight(weight, rotation, signs)) == pytest.approx(3, abs=0.2)
    heavy = normal(64, dim, seed=1) ** 3  # kurtosis 46 in theory
    assert kurtosis(heavy) > 20
    rows = rotate_weight(heavy, rotation, signs)
    assert kurtosis(rows / rows.norm(dim=1, keepdim=True)) == pytest.approx(3, abs=0.3)
