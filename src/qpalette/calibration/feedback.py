"""Calibrated rounding: the error of a column is made good by the columns after it, weighed by a Hessian.

LDLQ of QuIP (Chee et al., arXiv 2307.13304, sections 3 and 4) with the blocks of QuIP# (Tseng et al., arXiv
2402.04396): for H = (I + U) D (I + U)^T, U strictly block upper triangular, rounding block k to the nearest of
W_k + (W - W^) U_k makes tr((W - W^) H (W - W^)^T) = tr(R D R^T) with R the plain rounding errors. The last columns have
seen the errors of all others, and among all linear feedback this choice is the best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qpalette.codes.tiles import from_tiles, to_tiles
from qpalette.core.errors import HessianError
from qpalette.core.records import TILE, tiles_of

DAMPING = 0.01  # of the mean eigenvalue, loud ones clipped; GPTQ's figure
DAMPING_RULE = "mean eigenvalue, clipped at 16 times itself"  # jobs' digests hold it: another rule gives other codes
LOUD = 16  # times the mean: what no eigenvalue counts for more than
LOUDEST = 64  # eigenvalues that are looked at; attention sinks are a handful
STORED = 2**-23  # of the norm of H: what two roundings to float32, as it is stored and as it is returned, may take away
ASYMMETRY = 1e-3  # of the largest entry: far above rounding, far below another matrix

Encode = Callable[[Tensor], Tensor]  # float32 [tiles, 256] -> int32 [tiles, words]
Decode = Callable[[Tensor], Tensor]  # and back


class Feedback(NamedTuple):
    """The factor of a Hessian, to be used for every linear that reads the same input; K' is K, padded to tiles."""

    upper: Tensor  # U, float64 [K', K'], zero in and below the diagonal blocks
    hessian: Tensor  # float32 [K, K], symmetric, mean diagonal 1 before it was damped: what the feedback minimises


def encode_with_feedback(
    source: Tensor,
    hessian: Tensor | Feedback,
    encode: Encode,
    decode: Decode,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Round `source` [M, K], float32 rows of unit variance, so that tr(E H E^T) is small: LDLQ, 16 columns at a time.

    `hessian` is H [K, K], a floating type, in the basis of the source, or its `factorize`d form, which then holds the
    damping. Each step encodes ceil(M/16) tiles in one call: the rows of linears that share an input are best stacked.
    Returns the codes, int32 [ceil(M/16), ceil(K/16), words], and what they decode to, float32 [M, K].

    Raises HessianError as `factorize` does.
    """
    upper = (hessian if isinstance(hessian, Feedback) else factorize(hessian, damping)).upper
    rows, columns = source.shape
    padded = F.pad(source, (0, len(upper) - columns))
    decoded, errors = torch.empty_like(padded), torch.zeros_like(padded, dtype=upper.dtype)
    codes = []
    for start in range(0, len(upper), TILE):
        block = slice(start, start + TILE)
        # float64, so that the sum, and with it the codes, do not depend on how many rows are stacked.
        target = padded[:, block] + errors[:, :start] @ upper[:start, block]
        tiles = to_tiles(target.float())[:, 0]
        words = encode(tiles)
        decoded[:, block] = from_tiles(decode(words)[:, None], rows, TILE)
        errors[:, block] = padded[:, block].double() - decoded[:, block].double()
        codes.append(words)
    return torch.stack(codes, dim=1), decoded[:, :columns]


def factorize(hessian: Tensor, damping: float = DAMPING, name: str = "the group") -> Feedback:
    """U of H + damping * m I = (I + U) D (I + U)^T, from a float64 Cholesky factor, on the device of H; m is H's mean
    eigenvalue, in which none counts for more than LOUD times m.

    `hessian` [K, K] is any positive multiple of the second moments; a zero diagonal (an input that is never used) is
    fine. K is padded to a multiple of 16 by inputs of their own. The columns keep their order, first to last: after
    the rotation none stands out, and tiles could not follow another order.

    Raises HessianError, calling the group `name`, when H is not finite, not symmetric, zero, or not positive definite
    with this damping.
    """
    damped = _damped(hessian, damping, name)
    size = len(damped)
    padding = TILE * tiles_of(size) - size
    padded = F.pad(damped, (0, padding, 0, padding))
    padded.diagonal()[size:] = 1
    # Cholesky factors lower times upper; seen from the last column it is R R^T with R upper, as first to last needs.
    lower, info = torch.linalg.cholesky_ex(padded.flip(0, 1))
    if int(info) != 0:
        raise HessianError(
            f"the Hessian of {name} is not positive definite with a damping of {damping:g}; "
            "calibrate on more text, or use a larger damping"
        )
    return Feedback(_unit_upper(lower.flip(0, 1)), damped.float())


def fit_row_scales(source: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """The scale s of each row that minimises (w - s w^) H (w - s w^)^T, which is w H w^ / w^ H w^: float64 [M, 1].

    Plain least squares would undo part of the feedback: its errors are large in the norm of I and small in that of H.
    `source` and `decoded` are [M, K], `hessian` [K, K]; a decoded row of zeros gets 0.
    """
    weighed = (decoded @ hessian).double()
    norms = (weighed * decoded).sum(1, keepdim=True)
    return torch.where(norms > 0, (weighed * source).sum(1, keepdim=True) / norms, 0.0)


def _damped(hessian: Tensor, damping: float, name: str) -> Tensor:
    """float64, exactly symmetric, of mean diagonal 1 before damping: the scale of H means nothing."""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise HessianError(f"the Hessian of {name} has shape {tuple(hessian.shape)}, and must be square")
    if not 0 <= damping < float("inf"):
        raise HessianError(f"damping must be a number of at least 0, got {damping:g}")
    if not bool(hessian.isfinite().all()):
        raise HessianError(f"the Hessian of {name} holds NaN or infinity; calibrate again, in float32")
    exact = hessian.double()
    if float((exact - exact.T).abs().max()) > ASYMMETRY * float(exact.abs().max()):
        raise HessianError(f"the Hessian of {name} is not symmetric; calibrate again")
    mean = float(exact.diagonal().mean())
    if not mean > 0 or float(exact.diagonal().min()) < -damping * mean:
        raise HessianError(
            f"the Hessian of {name} is zero or has a negative diagonal, so it is no second moment; "
            "calibrate on more text"
        )
    symmetric = (exact + exact.T) / (2 * mean)
    least = STORED * float(symmetric.square().sum().sqrt())
    symmetric.diagonal().add_(max(damping * _clipped_mean(symmetric), least))
    return symmetric


def _clipped_mean(hessian: Tensor) -> float:
    """The m that is the mean of all min(eigenvalue, LOUD * m), for `hessian` of mean eigenvalue 1.

    The plain mean follows the few tokens that are louder than all others together (attention sinks), and damping in
    proportion to them drowns what all other inputs say. The diagonal shows nothing of it: a rotation spreads a loud
    direction evenly.
    """
    size = len(hessian)
    mean, quiet = 1.0, float(size)
    for clipped, value in enumerate(_largest_eigenvalues(hessian, LOUDEST).tolist(), start=1):
        if value <= LOUD * mean or LOUD * clipped >= size:
            break
        quiet -= value
        mean = max(0.0, quiet / (size - LOUD * clipped))
    return mean


def _largest_eigenvalues(symmetric: Tensor, count: int) -> Tensor:
    """About the `count` largest, descending, never above the true ones: Ritz values of a block Krylov space.

    A full decomposition of 14,336 inputs takes many times what the Cholesky factor does; loud directions are found at
    once, for they stand far above what follows.
    """
    start = torch.randn(len(symmetric), min(count, len(symmetric)), generator=torch.Generator().manual_seed(0))
    basis = start.to(symmetric)
    for _ in range(2):
        basis = torch.linalg.qr(symmetric @ basis).Q
    return torch.linalg.eigvalsh(basis.T @ symmetric @ basis).flip(0)


def _unit_upper(factor: Tensor) -> Tensor:
    """R upper triangular -> U with R R^T = (I + U) D (I + U)^T: each block column times its own block's inverse."""
    count = len(factor) // TILE
    upper = torch.zeros_like(factor)
    for index in range(1, count):
        block = slice(index * TILE, (index + 1) * TILE)
        above = factor[: block.start, block]
        upper[: block.start, block] = torch.linalg.solve_triangular(factor[block, block], above, upper=True, left=False)
    return upper
