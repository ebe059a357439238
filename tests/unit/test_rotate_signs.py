from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpalette.core.errors import ArtifactError
from qpalette.rotate import pack_signs, random_signs, unpack_signs


# Frozen: a model is rebuilt from its seed alone, so these never change.
def test_frozen_signs():
    signs = random_signs(77, 7, "model.layers.0.mlp")
    assert pack_signs(signs).tolist() == [219, 54, 195, 182, 195, 226, 161, 50, 46, 29]
    wide = random_signs(576, 0, "model.layers.0.self_attn.q_proj")
    digest = hashlib.sha256(wide.numpy().tobytes()).hexdigest()
    assert digest == "bf776eaeea8ab306409bcba01460356f171daf71b71830f9429cdaa7a0b6dffc"


def test_signs_are_balanced_and_depend_on_seed_and_name():
    signs = random_signs(1 << 14, 0, "a")
    assert signs.dtype == torch.int8
    assert set(signs.tolist()) == {1, -1}
    for other in (random_signs(1 << 14, 1, "a"), random_signs(1 << 14, 0, "b"), torch.ones(1 << 14)):
        assert abs(float((signs * other).float().mean())) < 0.04  # five standard deviations


def test_seed_must_be_an_integer():
    with pytest.raises(TypeError):
        random_signs(8, 1.0, "a")


@given(st.lists(st.sampled_from([1, -1]), min_size=1, max_size=40))
def test_packing_round_trips(values):
    signs = torch.tensor(values, dtype=torch.int8)
    packed = pack_signs(signs)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-len(values) // 8),)
    assert unpack_signs(packed, len(values)).tolist() == values


def test_bit_order():
    assert pack_signs(torch.tensor([-1, 1, 1, 1, 1, 1, 1, 1, 1, -1], dtype=torch.int8)).tolist() == [1, 2]


@pytest.mark.parametrize(
    "signs", [torch.tensor([1, 0, -1]), torch.ones(2, 2), torch.tensor([2.0]), torch.tensor([float("nan")])]
)
def test_only_signs_are_packed(signs):
    with pytest.raises(ValueError, match="signs must be"):
        pack_signs(signs)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int8),
        torch.zeros(1, 2, dtype=torch.uint8),
        torch.tensor([0, 4], dtype=torch.uint8),
    ],
)
def test_bad_packed_signs_are_refused(packed):
    with pytest.raises(ArtifactError, match="the signs of 10 inputs"):
        unpack_signs(packed, 10)
