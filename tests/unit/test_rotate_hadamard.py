from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from qpalette.core.errors import SpecError
from qpalette.rotate.dct import dct, dct_matrix, inverse_dct
from qpalette.rotate.hadamard import MAX_ORDER, hadamard, is_hadamard_order

ORDERS = [n for n in range(1, 301) if is_hadamard_order(n)] + [308, 464, 644, 684, 924, 1024]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal(order):
    matrix = hadamard(order)
    assert matrix.dtype == np.int8
    assert matrix.shape == (order, order)
    assert (abs(matrix) == 1).all()
    product = matrix.astype(np.int32) @ matrix.T.astype(np.int32)
    assert (product == order * np.eye(order, dtype=np.int32)).all()


def test_orders_below_100_that_exist_here():
    assert [n for n in ORDERS if n < 100 and n & (n - 1)] == [12, 20, 24, 28, 36, 44, 48, 60, 68, 72, 76, 80, 84]


def test_small_matrices_by_hand():
    assert hadamard(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    # Paley I, q = 11, squares {1, 3, 4, 5, 9}: row 1 is -1, then chi(0 - j) with the unit of the diagonal.
    assert hadamard(12)[0].tolist() == [1] * 12
    assert hadamard(12)[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]
    # Paley II, q = 17: the first block row is the zero block, then the block of +1.
    assert hadamard(36)[:2, :4].tolist() == [[1, -1, 1, 1], [-1, -1, 1, -1]]


# Frozen: stored models name these matrices, so a change here is a change of the file format.
@pytest.mark.parametrize(
    ("order", "digest"),
    [
        (12, "db7478025ce74776a8a2669368885b71737288dabf1e23985366a367b4f78ab9"),
        (16, "4173cdf0377bf83a777e9674bf71f5b1cbb97a7c767d5b8465e27b04c375ab1f"),
        (36, "1a7aed2f42a8c71de2ae13e765a6df2c2023519ef899b00d5d0baa7ee26f341b"),
    ],
)
def test_frozen_bytes(order, digest):
    assert hashlib.sha256(hadamard(order).tobytes()).hexdigest() == digest


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 35, 52, 92, 100, 428, 2 * MAX_ORDER, 10**11])
def test_unknown_orders_are_refused(order):
    with pytest.raises(SpecError, match=f"no Hadamard matrix of order {order} "):
        hadamard(order)


def test_the_shared_matrix_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        hadamard(8)[0, 0] = 3


@pytest.mark.parametrize("order", [1, 2, 3, 7, 107, 128])
def test_dct_matrix_is_orthogonal_and_the_fft_agrees(order):
    matrix = torch.from_numpy(dct_matrix(order))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-13)
    x = torch.randn(3, order, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dct(x), x @ matrix.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_dct(x), x @ matrix, rtol=0, atol=1e-12)


def test_dct_by_hand():
    half = 0.5**0.5
    expected = [[3**-0.5] * 3, [half, 0, -half], [6**-0.5, -2 * 6**-0.5, 6**-0.5]]
    np.testing.assert_allclose(dct_matrix(3), expected, atol=1e-15)
