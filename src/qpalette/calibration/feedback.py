"""Calibrated rounding: the error of a tile is made good by the tiles after it, by Hessians of one side or both.

The loss of an error E = W - W^ is tr(H_O E H_I E^T). With H_I = (I + U) D (I + U)^T and H_O = (I + V) C (I + V)^T, U
and V strictly block upper triangular in blocks of 16, it is the sum over tiles of tr(C_i R_ij D_j R_ij^T) for
R = (I + V)^T E (I + U). So tile (i, j) is best rounded to the nearest of W_ij plus what the tiles before it ask for:

    X_ij = sum over j' < j of E_ij' U_j'j,    F = E + X,    target = W_ij + X_ij + sum over i' < i of V_i'i^T F_i'j,

which leaves the plain rounding error in R_ij. With V = 0 it is LDLQ of QuIP (Chee et al., arXiv 2307.13304, sections 3
and 4) with the blocks of QuIP# (Tseng et al., arXiv 2402.04396); with both, YAQA (arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qpalette.codes.tiles import scan_order
from qpalette.core.errors import HessianError
from qpalette.core.records import TILE, tiles_of

DAMPING = 0.03  # of the mean eigenvalue, loud ones clipped
DAMPING_RULE = "mean eigenvalue, clipped at 16 times itself"  # jobs' digests hold it: another rule gives other codes
LOUD = 16  # times the mean: what no eigenvalue, and no token, counts for more than
LOUDEST = 64  # eigenvalues that are looked at; attention sinks are a handful
STORED = 2**-23  # of the norm of H: what two roundings to float32, as it is stored and as it is returned, may take away
ASYMMETRY = 1e-3  # of the largest entry: far above rounding, far below another matrix
SINGULAR = 1e-9  # of the mean diagonal: what keeps rows that are decoded to zeros from having any scale

TOGETHER = 16  # block columns of a factor that are solved in one call
PANEL = 8  # tiles whose errors reach the others one step at a time
WIDTH = PANEL * TILE

Encode = Callable[[Tensor], Tensor]  # float32 [tiles, 256] -> int32 [tiles, words]
Decode = Callable[[Tensor], Tensor]  # and back


class Feedback(NamedTuple):
    """The factor of a Hessian, to be used for every linear that reads the same input; K' is K, padded to tiles."""

    upper: Tensor  # U, float64 [K', K'], zero in and below the diagonal blocks
    hessian: Tensor  # float32 [K, K], symmetric, mean diagonal 1 before it was damped: what the feedback minimises


def encode_with_feedback(
    sources: Tensor, inputs: Tensor, encode: Encode, decode: Decode, outputs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round `sources` [B, M, K], float32 matrices of unit rows, so that tr(H_O E H_I E^T) of each is small.

    `inputs` is U of each, float64 [B, K', K']. `outputs` is V of each block of rows that has an H_O of its own, float64
    [B, blocks, height, height]: block b is of the rows from b * height on, height a multiple of 16, and the last one
    may have fewer. None: rows do not know each other.

    Tiles whose place in their block and whose column add up to the same are independent of each other: they are encoded
    in one call, of all matrices and blocks, so that there are height / 16 + K' / 16 - 1 steps, or K' / 16.

    Returns the codes, int32 [B, ceil(M/16), ceil(K/16), words], and what they decode to, float32 [B, M, K].
    """
    state = _State(sources, inputs, outputs)
    words: Tensor | None = None
    for step in range(state.depth + state.columns - 1):
        first, last = max(0, step - state.columns + 1), min(state.depth, step + 1)
        places = torch.arange(first, last, device=sources.device)
        columns = step - places
        fed = state.from_inputs(places, columns)
        target = state.source[:, :, places, columns] + fed + state.from_outputs(places, columns)
        row, column = scan_order(sources.device)
        tiles = target[..., row, column].float()
        codes = encode(tiles.flatten(0, -2).contiguous())
        decoded = torch.empty_like(target, dtype=torch.float32)
        decoded[..., row, column] = decode(codes).view(tiles.shape)
        state.put(places, columns, fed, decoded)
        state.pass_on(first, last, step)
        if words is None:
            words = codes.new_zeros(*state.source.shape[:4], codes.shape[-1])
        words[:, :, places, columns] = codes.view(*tiles.shape[:-1], -1)
    assert words is not None
    return words.flatten(1, 2)[:, : tiles_of(sources.shape[1])], state.matrix(state.decoded)


class _State:
    """Matrices while they are rounded: B of them, each of P blocks of S tile rows, of C tile columns.

    What a tile has from others of its panel (8 tiles) is summed when it is its turn; what it has from panels before,
    when these are done, as one large product. Everything but weights is float64, so that sums, and with them the codes,
    do not depend on what is rounded together.
    """

    def __init__(self, sources: Tensor, inputs: Tensor, outputs: Tensor | None) -> None:
        batch, self.rows, self.width = sources.shape
        self.columns = inputs.shape[-1] // TILE
        self.depth = 1 if outputs is None else outputs.shape[-1] // TILE
        height, size = TILE * self.depth, TILE * self.columns
        blocks = -(-self.rows // height)
        self.shape = (batch, blocks, self.depth, self.columns)
        padded = F.pad(sources, (0, size - self.width, 0, blocks * height - self.rows))
        self.source = padded.view(batch, blocks, self.depth, TILE, self.columns, TILE).transpose(3, 4).contiguous()
        self.decoded = torch.empty_like(self.source)  # [B, P, S, C, 16, 16], as the source
        # As they are multiplied: E and X with a row's tiles side by side, F and V^T F with a column's on each other.
        self.upper = _whole_panels(inputs)
        self.errors = inputs.new_zeros(batch, self.depth, blocks * TILE, self.upper.shape[-1])
        self.fed = torch.zeros_like(self.errors)
        self.left: Tensor | None = None
        if outputs is not None:
            self.left = _whole_panels(outputs.transpose(2, 3))  # V^T
            self.owed = inputs.new_zeros(batch, blocks, self.columns, self.left.shape[-1], TILE)
            self.owing = torch.zeros_like(self.owed)

    def from_inputs(self, places: Tensor, columns: Tensor) -> Tensor:
        """X of the tiles of a step, one at each of the `places` in their blocks: float64 [B, P, places, 16, 16]."""
        batch, blocks = self.shape[:2]
        panels, within = columns // PANEL, columns % PANEL
        errors = self.errors.unflatten(3, (-1, WIDTH))[:, places, :, panels]  # [places, B, P * 16, WIDTH]
        factor = _diagonal_panels(self.upper).unflatten(3, (PANEL, TILE))[:, panels, :, within]
        known = self.fed.unflatten(3, (-1, TILE))[:, places, :, columns]
        near = known + errors @ factor
        return near.view(len(places), batch, blocks, TILE, TILE).permute(1, 2, 0, 3, 4)

    def from_outputs(self, places: Tensor, columns: Tensor) -> Tensor | float:
        """sum of V^T F over the rows above, float64 [B, P, places, 16, 16]."""
        if self.left is None:
            return 0.0
        panels, within = places // PANEL, places % PANEL
        owed = self.owed.unflatten(3, (-1, WIDTH))[:, :, columns, panels]
        factor = _diagonal_panels(self.left).unflatten(3, (PANEL, TILE))[:, :, panels, within]
        return self.owing.unflatten(3, (-1, TILE))[:, :, columns, places] + factor @ owed

    def put(self, places: Tensor, columns: Tensor, fed: Tensor, decoded: Tensor) -> None:
        """What the tiles of a step were rounded to; `fed` is their X."""
        error = self.source[:, :, places, columns].double() - decoded
        self.decoded[:, :, places, columns] = decoded
        batch, blocks = self.shape[:2]
        rows = self.errors.view(batch, self.shape[2], blocks, TILE, -1, TILE)
        rows[:, places, :, :, columns] = error.permute(2, 0, 1, 3, 4)
        if self.left is not None:
            self.owed.unflatten(3, (-1, TILE))[:, :, columns, places] = fed + error

    def pass_on(self, first: int, last: int, step: int) -> None:
        """Panels that ended with the tiles of a step give the tiles after them all that they have for them."""
        for place in range(first, last):
            done = step - place + 1  # tile columns of this row
            if done % PANEL == 0 and done < self.columns:
                panel, rest = slice(TILE * (done - PANEL), TILE * done), slice(TILE * done, None)
                self.fed[:, place, :, rest] += self.errors[:, place, :, panel] @ self.upper[:, panel, rest]
            done, column = place + 1, step - place
            if self.left is not None and done % PANEL == 0 and done < self.depth:
                panel, rest = slice(TILE * (done - PANEL), TILE * done), slice(TILE * done, None)
                self.owing[:, :, column, rest] += self.left[:, :, rest, panel] @ self.owed[:, :, column, panel]

    def matrix(self, tiles: Tensor) -> Tensor:
        """[B, P, S, C, 16, 16] -> [B, M, K]."""
        whole = tiles.transpose(3, 4).reshape(len(tiles), -1, TILE * self.columns)
        return whole[:, : self.rows, : self.width]


def _whole_panels(factor: Tensor) -> Tensor:
    """[..., n, n] -> the same, filled up to a multiple of WIDTH; what is whole already is not copied."""
    missing = -factor.shape[-1] % WIDTH
    return (F.pad(factor, (0, missing) * 2) if missing else factor).contiguous()


def _diagonal_panels(factor: Tensor) -> Tensor:
    """A view of the diagonal blocks of [..., n, n]: [..., n / WIDTH, WIDTH, WIDTH]."""
    count = factor.shape[-1] // WIDTH
    cut = factor.unflatten(-1, (count, WIDTH)).unflatten(-3, (count, WIDTH))  # [..., count, WIDTH, count, WIDTH]
    return cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def stack_factors(blocks: Sequence[Feedback]) -> Tensor:
    """V of the blocks of one matrix, float64 [blocks, height, height]; the last is filled up to the first's height."""
    height = len(blocks[0].upper)
    return torch.stack([F.pad(block.upper, (0, height - len(block.upper)) * 2) for block in blocks])


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


def fit_row_scales(source: Tensor, decoded: Tensor, hessian: Tensor, outputs: Sequence[Tensor] = ()) -> Tensor:
    """The row scales s that minimise tr(H_O E H_I E^T), E = W - diag(s) W^: float64 [M, 1].

    They solve A s = b with A = H_O o (W^ H_I W^^T) and b the row sums of H_O o (W^ H_I W^T), o entry by entry, block by
    block of `outputs`. Without outputs A is diagonal: s = w H w^ / w^ H w^, row by row. Plain least squares would undo
    part of the feedback: its errors are large in the norm of I and small in that of H. `source` and `decoded` are
    [M, K], `hessian` [K, K]; a decoded row of zeros gets 0.
    """
    weighed = (decoded @ hessian).double()
    norms = (weighed * decoded).sum(1, keepdim=True)
    if not outputs:
        return torch.where(norms > 0, (weighed * source).sum(1, keepdim=True) / norms, 0.0)
    scales, start = [], 0
    for block in outputs:
        rows = slice(start, start + len(block))
        system = block.double() * (weighed[rows] @ decoded[rows].double().T)
        system = (system + system.T) / 2
        system.diagonal().add_(SINGULAR * system.diagonal().mean()).clamp_(min=torch.finfo(torch.float64).tiny)
        right = (block.double() * (weighed[rows] @ source[rows].double().T)).sum(1, keepdim=True)
        scales.append(torch.linalg.solve(system, right))
        start = rows.stop
    return torch.where(norms > 0, torch.cat(scales), 0.0)


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
    """R upper triangular -> U with R R^T = (I + U) D (I + U)^T: each block column times its own block's inverse.

    Several block columns at a time: one by one, a GPU waits for the host at each.
    """
    upper = torch.zeros_like(factor)
    blocks = factor.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    for first in range(0, len(blocks), TOGETHER):
        own = blocks[first : first + TOGETHER]
        columns = slice(TILE * first, TILE * (first + len(own)))
        above = factor[: columns.stop, columns].unflatten(1, (-1, TILE)).transpose(0, 1)  # [columns, rows, 16]
        solved = torch.linalg.solve_triangular(own, above, upper=True, left=False)
        upper[: columns.stop, columns] = solved.transpose(0, 1).flatten(1)
        corner = upper[columns, columns].unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE))
        corner.masked_fill_(torch.ones_like(corner[:, 0, :, 0], dtype=torch.bool).tril()[:, None, :, None], 0)
    return upper
