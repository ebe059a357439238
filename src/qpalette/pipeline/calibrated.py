"""Linears that read the same input, from float weights to packed tensors with error feedback (LDLQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qpalette.calibration.feedback import Feedback, encode_with_feedback, factorize, fit_row_scales
from qpalette.calibration.hessians import rotate_hessian
from qpalette.core.records import TILE
from qpalette.pipeline.encode import EncodedLinear, Quality, check_finite, check_scales, encode_tiles, round_scales
from qpalette.pipeline.jobs import Job
from qpalette.rotate import Rotation, pack_signs, rotate_weight
from qpalette.runtime import Backend, select

STACKED_WEIGHTS = 1 << 26  # encoded together, in whole tile rows: a step sees 16 columns of them, and must fill a GPU


@dataclass(frozen=True)
class _Rows:
    """One linear in the rotated basis: float32 [M, K] of unit variance, and the float64 [M, 1] that was divided out."""

    name: str
    unit: Tensor
    rms: Tensor


def encode_linears(
    jobs: Sequence[Job], weights: Sequence[Tensor], hessian: Tensor, damping: float, device: torch.device
) -> list[EncodedLinear]:
    """Quantize `weights` [M, K] of linears of one group, whose input has the second moments `hessian` [K, K].

    `hessian` is in the basis of the checkpoint. The rows of linears with the same spec are stacked; encoding them one
    by one gives the same codes. Raises as `encode_linear`, and HessianError when the Hessian cannot be used.
    """
    first = jobs[0]
    rotation, signs = Rotation.parse(first.record.rotation, first.linear.in_features), first.signs().to(device)
    rotated = rotate_hessian(hessian.to(device), rotation, signs)
    feedback = factorize(rotated, damping, first.group.name)
    moments = (rotated / rotated.diagonal().mean()).float()
    members = [_normalised(job.name, w, rotation, signs) for job, w in zip(jobs, weights, strict=True)]
    encoded: dict[str, EncodedLinear] = {}
    for spec in dict.fromkeys(job.record.spec for job in jobs):
        stack = [member for job, member in zip(jobs, members, strict=True) if job.record.spec == spec]
        codes, decoded = _encode_stacked(stack, feedback, spec, select("encode", spec, device))
        for member, words, values in zip(stack, codes, decoded, strict=True):
            encoded[member.name] = _finish(member, words, values, feedback.hessian, moments, signs)
    return [encoded[job.name] for job in jobs]


def _normalised(name: str, weight: Tensor, rotation: Rotation, signs: Tensor) -> _Rows:
    check_finite(name, weight)
    rotated = rotate_weight(weight.to(signs.device), rotation, signs)
    rms = torch.linalg.vector_norm(rotated, dim=1, keepdim=True, dtype=torch.float64) / rotation.dim**0.5
    check_scales(name, rms)
    return _Rows(name, torch.where(rms > 0, rotated / rms, 0.0).float(), rms)


def _encode_stacked(
    members: Sequence[_Rows], feedback: Feedback, spec: str, backend: Backend
) -> tuple[list[Tensor], list[Tensor]]:
    """Codes and decoded weights of each member; each starts at a tile row of its own, as it is stored."""
    heights = [len(member.unit) for member in members]
    padded = [height + -height % TILE for height in heights]
    stacked = torch.cat([F.pad(m.unit, (0, 0, 0, p - h)) for m, h, p in zip(members, heights, padded, strict=True)])
    rows = max(1, STACKED_WEIGHTS // (TILE * stacked.shape[1])) * TILE
    encode, decode = partial(encode_tiles, backend, spec), partial(backend.decode, spec)
    parts = [encode_with_feedback(chunk, feedback, encode, decode) for chunk in stacked.split(rows)]
    codes = torch.cat([part[0] for part in parts]).split([p // TILE for p in padded])
    decoded = torch.cat([part[1] for part in parts]).split(padded)
    return list(codes), [rows[:height] for rows, height in zip(decoded, heights, strict=True)]


def _finish(
    member: _Rows, codes: Tensor, decoded: Tensor, damped: Tensor, moments: Tensor, signs: Tensor
) -> EncodedLinear:
    gains = fit_row_scales(member.unit, decoded, damped)
    scales, faint = round_scales(member.name, gains * member.rms)
    source = member.unit * member.rms
    error = source - scales.double() * decoded
    return EncodedLinear(
        codes=codes.cpu(),
        scales=scales.flatten().view(torch.int16).cpu(),
        diagonal=pack_signs(signs),
        quality=Quality(
            distortion=_ratio(error.square().sum(), source.square().sum()),
            proxy=_ratio(_energy(error, moments), _energy(source, moments)),
            faint_rows=faint,
        ),
    )


def _energy(rows: Tensor, moments: Tensor) -> Tensor:
    """tr(A H A^T); products in float32, their sum in float64."""
    single = rows.float()
    return ((single @ moments).double() * single).sum()


def _ratio(error: Tensor, energy: Tensor) -> float:
    return float(error / energy) if float(energy) else 0.0
