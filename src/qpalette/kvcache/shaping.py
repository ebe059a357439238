"""Keys whose error goes where no query looks: noise shaping, with an A that makes it as good as it can be.

Let y = A (x - m) have unit variance in all directions, A = P^T C^(-1/2). What an error e of y costs is e.M e for
M = P^T C^(1/2) G C^(1/2) P = L^T D L, L unit lower triangular: sum D_i (e_i + sum_j<i L_ij e_j)^2. If the coordinates
are coded one after the other, and each makes good what those before it have cost, what is left is sum D_i n_i^2, n_i
the code's own error. The least of the sum of the D_i, over all rotations P, is d det(G C)^(1/d), where all are equal:
that is reverse water-filling's bound, less only what the code itself is short of. Such a P exists for every M (the
geometric mean decomposition: Jiang, Hager and Li, Linear Algebra and its Applications 396, 2005). `balanced` is short
of it by the spread of the eigenvalues: on SmolLM2's keys by a factor of 2.3 (benchmarks/cache.py).

Coordinates of one block correct nothing of each other (L is the identity there), so that a block is coded at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpalette.core.errors import SpecError
from qpalette.kvcache.transform import Transform, made_of, power, raised
from qpalette.kvcache.vectors import BLOCK

_HALVINGS = 50
_TRIES = 4  # powers of the inverse until a direction is below the mean: the first is, but for nearly equal eigenvalues


def shaped(mean: Tensor, covariance: Tensor, metric: Tensor, distortion: float) -> Transform:
    """For a code of this `distortion`; mean [heads, dim], covariance C and metric G [heads, dim, dim].

    Errors that are fed back add to what is coded, the more the less a direction costs; as much as the code's distortion
    is added to all costs, below which a direction is not worth a correction.

    Raises SpecError when heads are no whole blocks.
    """
    if mean.shape[-1] % BLOCK:
        raise SpecError(f"heads of {mean.shape[-1]} numbers are no blocks of {BLOCK}: write balanced: before the code")
    c, g = raised(covariance.double()), raised(metric.double())
    root = power(c, 0.5)
    cost = root @ g @ root
    level = distortion * cost.diagonal(dim1=-2, dim2=-1).mean(-1)
    cost = cost + level[:, None, None] * torch.eye(cost.shape[-1], dtype=cost.dtype, device=cost.device)
    rotation = equal_rotation(cost, BLOCK)
    lower = unit_lower(rotation.mT @ cost @ rotation)
    feedback = lower - torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    feedback = feedback * _below_blocks(lower.shape[-1], lower.device)
    spread = 1 + distortion * feedback.square().sum((-2, -1)) / lower.shape[-1]
    # What is coded has that variance, and a code shrinks: a key's length along itself is to stay.
    gain = spread.sqrt() / (1 - distortion)
    plain = made_of(rotation.mT @ power(c, -0.5), mean)
    return Transform(plain.matrix, plain.inverse, plain.mean, feedback.float(), gain.float())


def equal_rotation(cost: Tensor, block: int) -> Tensor:
    """P, orthogonal, float64 [heads, dim, dim], for `cost` M [heads, dim, dim]: the D_i of P^T M P are equal, or as
    near as what is left allows to those that are found last and coded first; L is the identity in blocks.

    Found from the last coordinate to the first: a direction p with p.S p = det(M)^(1/dim), S what the directions after
    it leave of M (its Schur complement), which again has that geometric mean of eigenvalues. It is a mixture of a
    random direction, which costs more, and one of the inverse of S, which costs less.
    """
    heads, dim = cost.shape[:2]
    generator = torch.Generator().manual_seed(0)
    level = torch.linalg.eigvalsh(cost).clamp(min=torch.finfo(cost.dtype).tiny).log().mean(-1).exp()
    basis = torch.eye(dim, dtype=cost.dtype, device=cost.device).expand(heads, dim, dim)
    found: list[Tensor] = []
    left = cost
    while basis.shape[-1] > block:
        directions = _block_of(left, level, block, generator)
        complete = torch.linalg.qr(directions, mode="complete")[0]
        rest = complete[..., block:]
        found.append(basis @ directions)
        cross = rest.mT @ left @ directions
        left = rest.mT @ left @ rest - cross @ torch.linalg.solve(directions.mT @ left @ directions, cross.mT)
        left = (left + left.mT) / 2
        basis = basis @ rest
    found.append(basis @ torch.linalg.eigh(left)[1])
    return torch.cat(found[::-1], -1)


def _block_of(cost: Tensor, level: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """`block` orthonormal directions [heads, m, block] of cost `level`, none of which corrects another: p.S p' = 0."""
    heads, size = cost.shape[:2]
    directions = cost.new_zeros(heads, size, 0)
    inverse = torch.linalg.inv(cost)
    while directions.shape[-1] < block:
        barred = torch.cat([directions, cost @ directions], -1)
        start = torch.randn(heads, size, 1, dtype=torch.float64, generator=generator).to(cost)
        high = _unit(_without(start, barred, torch.eye(size, dtype=cost.dtype, device=cost.device)))
        low = high
        for _ in range(_TRIES):
            below = _cost(low, cost) < level
            low = torch.where(below[:, None, None], low, _unit(_without(inverse @ low, barred, inverse)))
        directions = torch.cat([directions, _between(low, high, cost, level)], -1)
    return directions


def _without(vector: Tensor, barred: Tensor, metric: Tensor) -> Tensor:
    """`vector` less what `metric` times the columns of `barred` can give, so that barred^T times it is 0."""
    if barred.shape[-1] == 0:
        return vector
    carried = metric @ barred
    return vector - carried @ torch.linalg.solve(barred.mT @ carried, barred.mT @ vector)


def _between(low: Tensor, high: Tensor, cost: Tensor, level: Tensor) -> Tensor:
    """The unit vector between the two whose cost is `level`; that of `low` or `high` where both are on one side."""
    start, stop = torch.zeros_like(level), torch.ones_like(level)
    for _ in range(_HALVINGS):
        middle = (start + stop) / 2
        above = _cost(_unit(low + middle[:, None, None] * (high - low)), cost) > level
        start, stop = torch.where(above, start, middle), torch.where(above, middle, stop)
    return _unit(low + start[:, None, None] * (high - low))


def _cost(vector: Tensor, cost: Tensor) -> Tensor:
    return (vector.mT @ cost @ vector)[:, 0, 0]


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-2, keepdim=True)


def unit_lower(matrix: Tensor) -> Tensor:
    """L of L^T D L, unit lower triangular, for symmetric positive definite [heads, dim, dim]."""
    factor = torch.linalg.cholesky(matrix.flip(-2, -1)).flip(-2, -1).mT
    return factor / factor.diagonal(dim1=-2, dim2=-1)[..., None]


def _below_blocks(dim: int, device: torch.device) -> Tensor:
    """1 below the diagonal blocks, 0 in and above them, so that nothing of rounding is left there."""
    number = torch.arange(dim, device=device) // BLOCK
    return (number[:, None] > number).double()
