"""A rotation fitted to what its input looks like: of several seeds for the signs, the one of least predicted loss.

Calibrated rounding of rows of unit variance costs D * tr(D_H), with D the quantizer's distortion and D_H the diagonal
blocks of H = (I + U) D_H (I + U)^T in the rotated basis (`feedback.py`). All rotations have one determinant,
and the sum is least when all blocks are alike; how far a random rotation is from that depends on its signs. Without
Hessians there is nothing to fit: after any of these rotations the weights are as good as Gaussian.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

from qpalette.calibration.feedback import DAMPING_RULE, factorize
from qpalette.calibration.hessians import HessianStore, rotate_hessian
from qpalette.core.errors import InputError
from qpalette.core.records import TILE, LinearGroup, tiles_of
from qpalette.rotate import Rotation, random_signs

CHOSEN = "signs.json"  # beside the Hessians: choosing again would take as long as it did


def learn_seeds(
    groups: Iterable[tuple[LinearGroup, Rotation]],
    hessians: HessianStore,
    first_seed: int,
    candidates: int,
    damping: float,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Group name -> the best of the seeds `first_seed` .. `first_seed + candidates - 1`.

    What was chosen is kept beside the Hessians. Raises InputError when there is no candidate, and HessianError as
    `factorize` and `HessianStore.read` do.
    """
    if candidates < 1:
        raise InputError(f"the number of sign seeds to try must be at least 1, got {candidates}")
    file, todo = hessians.directory / CHOSEN, list(groups)
    known, seeds = _read(file), {}
    for done, (group, rotation) in enumerate(todo, start=1):
        what = [hessians.identity(group), rotation.name, damping, DAMPING_RULE, first_seed, candidates, group.name]
        key = json.dumps(what)
        if key not in known:
            damped = factorize(hessians.read(group).to(device), damping, group.name).hessian.double()
            tried = range(first_seed, first_seed + candidates)
            losses = {seed: predicted_loss(damped, rotation, seed, group.name) for seed in tried}
            known[key] = min(losses, key=lambda seed: losses[seed])
            _write(file, known)
        seeds[group.name] = known[key]
        if progress is not None:
            progress(done, len(todo))
    return seeds


def predicted_loss(damped: torch.Tensor, rotation: Rotation, seed: int, name: str) -> float:
    """tr(D_H) / K of a symmetric `damped` Hessian [K, K] in the basis that the seed's signs give, K padded to tiles.

    Of a Hessian of mean diagonal 1 it is 1 without feedback, and less with it. Not positive definite: infinite.
    """
    rotated = rotate_hessian(damped, rotation, random_signs(rotation.dim, seed, name).to(damped.device))
    padding = TILE * tiles_of(rotation.dim) - rotation.dim
    padded = F.pad(rotated, (0, padding, 0, padding))
    padded.diagonal()[rotation.dim :] = 1
    # H = R R^T with R upper triangular, from the Cholesky factor seen from the last column, as in `factorize`.
    lower, info = torch.linalg.cholesky_ex(padded.flip(0, 1))
    if int(info) != 0:
        return float("inf")
    blocks = lower.reshape(-1, TILE, len(lower) // TILE, TILE).diagonal(dim1=0, dim2=2)
    return float(blocks.square().sum() - padding) / rotation.dim


def _read(file: Path) -> dict[str, int]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: Path, known: dict[str, int]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=0), encoding="utf-8", newline="\n")
    os.replace(temporary, file)
