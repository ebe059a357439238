"""Hadamard matrices, by one deterministic rule: an order names exactly one matrix, for ever.

The rule is part of the file format (a stored rotation says `h36`, not its entries):

1. a power of two: Sylvester, H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]];
2. else, if q = order - 1 is a prime, q = 3 mod 4: Paley's first construction;
3. else, if q = order / 2 - 1 is a prime, q = 1 mod 4: Paley's second construction;
4. else none here (Hadamard matrices of other orders exist, and are not used).

Both of Paley's constructions use the residue matrix R of the prime q, R[i, j] = chi(i - j) with i, j = 0..q-1, where
chi(0) = 0, chi(a) = 1 if a is a square mod q, else -1. Source: R. Paley, "On orthogonal matrices", Journal of
Mathematics and Physics 12 (1933), lemmas 2 and 3; prime powers are left out.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qpalette.core.errors import SpecError

MAX_ORDER = 1024  # of a dense matrix; larger rotations are Kronecker products


def hadamard(order: int) -> NDArray[np.int8]:
    """The Hadamard matrix H of `order` by the rule above: int8 [order, order] of +-1, H H^T = order * I, read-only.

    Raises SpecError when the rule has no matrix of that order, or it is above MAX_ORDER.
    """
    if not is_hadamard_order(order):
        raise SpecError(
            f"no Hadamard matrix of order {order} is known here: use a power of two, p + 1 with a prime p = 3 mod 4, "
            f"or 2p + 2 with a prime p = 1 mod 4, up to {MAX_ORDER}"
        )
    return _hadamard(order)


def is_hadamard_order(order: int) -> bool:
    """Whether `hadamard(order)` exists; costs a few divisions and no memory."""
    return 1 <= order <= MAX_ORDER and (is_power_of_two(order) or _is_paley_one(order) or _is_paley_two(order))


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@lru_cache(maxsize=64)
def _hadamard(order: int) -> NDArray[np.int8]:
    if is_power_of_two(order):
        matrix = _sylvester(order)
    elif _is_paley_one(order):
        matrix = _paley_one(order - 1)
    else:
        matrix = _paley_two(order // 2 - 1)
    matrix.flags.writeable = False  # the cache hands out one array
    return matrix


def _is_paley_one(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _is_paley_two(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1)


def _is_prime(n: int) -> bool:
    return n >= 2 and all(n % d for d in range(2, int(n**0.5) + 1))


def _sylvester(order: int) -> NDArray[np.int8]:
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _paley_one(q: int) -> NDArray[np.int8]:
    """H = I + [[0, 1^T], [-1, R]]: order q + 1. R is skew-symmetric as q = 3 mod 4."""
    matrix = _bordered(_residues(q), corner=0, column=-1)
    return matrix + np.eye(q + 1, dtype=np.int8)


def _paley_two(q: int) -> NDArray[np.int8]:
    """H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], with C = [[0, 1^T], [1, R]]: order 2q + 2.

    R is symmetric as q = 1 mod 4, and so is H.
    """
    conference = _bordered(_residues(q), corner=0, column=1)
    plus, zero = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(conference, plus) + np.kron(np.eye(q + 1, dtype=np.int8), zero)


def _residues(q: int) -> NDArray[np.int8]:
    """R[i, j] = chi(i - j), int8 [q, q]."""
    chi = np.full(q, -1, np.int8)
    chi[np.arange(q, dtype=np.int64) ** 2 % q] = 1
    chi[0] = 0
    return chi[np.subtract.outer(np.arange(q), np.arange(q)) % q]


def _bordered(core: NDArray[np.int8], corner: int, column: int) -> NDArray[np.int8]:
    """`core` below a first row of ones and right of a first column of `column`."""
    matrix = np.ones((len(core) + 1, len(core) + 1), np.int8)
    matrix[1:, 0], matrix[1:, 1:], matrix[0, 0] = column, core, corner
    return matrix
