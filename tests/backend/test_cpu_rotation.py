"""The compiled rotation against its definition: every kind of factor, whole vectors of lanes and what is left over."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qpalette.backends.cpu.transform import factors_of, half_multiplier, sign_multiplier, transform_rows
from qpalette.rotate import Rotation, pack_signs, random_signs
from tolerance import check_float32

ROTATIONS = [
    ("h2", 6),
    ("h8", 40),
    ("h16", 48),
    ("h64", 576),
    ("h4096", 4096),
    ("h36xh16", 576),
    ("h12xh32", 384),
    ("c107xh128", 13696),
    ("c7xh4", 28),
    ("h20xh8", 320),
    ("c5xc40", 200),
    ("h32xc3", 96),
    ("h4xc6", 72),
    ("c45", 45),
]


@pytest.mark.parametrize(("name", "size"), ROTATIONS)
@pytest.mark.parametrize("inverse", [False, True])
def test_rows_are_rotated_as_defined(name: str, size: int, inverse: bool) -> None:
    """What is beside a row stays; a row among others is the same bits as alone."""
    generator = torch.Generator().manual_seed(size)
    x, multiplier = torch.randn(3, size, generator=generator), torch.rand(size, generator=generator) + 0.5
    factors, found = factors_of(name, size, inverse), np.full((3, size + 7), np.float32(-1))
    transform_rows(x.numpy(), multiplier.numpy(), factors, found)
    rotation = Rotation.parse(name, size)
    rotate = rotation.inverse if inverse else rotation.apply
    terms = sum(factor.order for factor in rotation.factors) + 2
    operands = x.double(), multiplier.double()
    check_float32(torch.from_numpy(found[:, :size]), lambda x, multiplier: rotate(x * multiplier), operands, terms)
    assert (found[:, size:] == -1).all()
    alone = np.zeros((1, size), np.float32)
    transform_rows(x[1:2].numpy(), multiplier.numpy(), factors, alone)
    assert np.array_equal(alone[0], found[1, :size])


@pytest.mark.parametrize("size", [1, 8, 15, 16, 45, 576])
def test_a_diagonal_is_what_is_stored(size: int) -> None:
    signs, values = random_signs(size, 3, "test"), torch.randn(size).half()
    assert np.array_equal(sign_multiplier(pack_signs(signs).numpy(), size), signs.numpy().astype(np.float32))
    assert np.array_equal(half_multiplier(values.view(torch.int16).numpy()), values.float().numpy())
