"""What calibrated rounding is worth to each group of linears, before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from qpalette.calibration.feedback import DAMPING, Feedback, factorize
from qpalette.calibration.hessians import HessianStore, rotate_hessian
from qpalette.core.records import LinearGroup
from qpalette.plan import Sensitivities
from qpalette.rotate import random_signs, rotation_for


def feedback_gain(feedback: Feedback) -> float:
    """tr D / tr H for H = (I + U) D (I + U)^T: the error of a layer's outputs with feedback over that without.

    Rounding errors R of equal size in every column cost tr(R D R^T) with feedback and tr(R H R^T) without (QuIP, arXiv
    2307.13304, section 3).
    """
    size = len(feedback.hessian)
    unit = torch.eye(size, dtype=torch.float64, device=feedback.upper.device) + feedback.upper[:size, :size]
    half = torch.linalg.solve_triangular(unit, feedback.hessian.double(), upper=True)
    diagonal = torch.linalg.solve_triangular(unit, half.T.contiguous(), upper=True).diagonal()
    return float(diagonal.sum() / feedback.hessian.double().diagonal().sum())


def feedback_gains(
    store: HessianStore,
    groups: Iterable[LinearGroup],
    rotation: str = "full",
    seed: int = 0,
    damping: float = DAMPING,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """The gain of each group by name. Raises HessianError when one is missing or cannot be used."""
    return {group.name: feedback_gain(_feedback(store, group, rotation, seed, damping, device)) for group in groups}


def with_feedback(sensitivities: Sensitivities, gains: dict[str, float]) -> Sensitivities:
    """Sensitivities to the distortion of plain rounding, once feedback has reduced what it costs."""
    linears = tuple(
        replace(linear, sensitivity=linear.sensitivity * gains.get(linear.group, 1.0))
        for linear in sensitivities.linears
    )
    return Sensitivities(linears, {**sensitivities.provenance, "rounding": "calibrated"})


def _feedback(
    store: HessianStore, group: LinearGroup, rotation: str, seed: int, damping: float, device: str | torch.device
) -> Feedback:
    hessian: Tensor = store.read(group).to(device)
    signs = random_signs(group.in_features, seed, group.name).to(device)
    rotated = rotate_hessian(hessian, rotation_for(group.in_features, rotation), signs)
    return factorize(rotated, damping, group.name)
