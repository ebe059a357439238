"""Linears of one shape, from float weights to packed tensors with error feedback, each by the Hessians of its group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from qpalette.calibration.feedback import encode_with_feedback, fit_row_scales
from qpalette.calibration.rounding import Prepared
from qpalette.core.records import FLOAT16
from qpalette.pipeline.encode import EncodedLinear, Quality, check_scales, encode_tiles, round_scales
from qpalette.pipeline.jobs import Job
from qpalette.rotate import pack_signs
from qpalette.runtime import select


def encode_linears(jobs: Sequence[Job], members: Sequence[Prepared], device: torch.device) -> list[EncodedLinear]:
    """Quantize linears of one shape, spec and rotation together; one by one they get the same codes.

    Raises as `encode_linear` does.
    """
    spec = jobs[0].record.spec
    backend = select("encode", spec, device)
    for member in members:
        check_scales(member.name, member.rms)
    lefts = [left for member in members if (left := member.left) is not None]
    codes, decoded = encode_with_feedback(
        _stacked([member.unit for member in members]),
        _stacked([member.inputs.upper for member in members]),
        partial(encode_tiles, backend, spec),
        partial(backend.decode, spec),
        _stacked(lefts) if lefts else None,
    )
    together = zip(jobs, members, codes, decoded, strict=True)
    return [_finish(job, member, words, values) for job, member, words, values in together]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One is not copied: alone, it may be as large as there is room for."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _finish(job: Job, member: Prepared, codes: Tensor, decoded: Tensor) -> EncodedLinear:
    gains = fit_row_scales(member.unit, decoded, member.inputs.hessian, [side.hessian for side in member.outputs])
    scales, faint = round_scales(member.name, gains * member.rms)
    # In units of the rows, as the moments are; a row of zeros is exact.
    error = member.unit - torch.where(member.rms > 0, scales.double() / member.rms, 0.0).float() * decoded
    weight, lost = member.restore(member.unit), member.restore(error)
    return EncodedLinear(
        codes=codes.cpu(),
        scales=scales.flatten().view(torch.int16).cpu(),
        diagonal=_stored(member.diagonal, job.record.diagonal),
        quality=Quality(
            distortion=_ratio(lost.double().square().sum(), weight.double().square().sum()),
            proxy=_ratio(_energy(member, error), _energy(member, member.unit)),
            faint_rows=faint,
        ),
    )


def _stored(diagonal: Tensor, kind: str) -> Tensor:
    return diagonal.half().view(torch.int16).cpu() if kind == FLOAT16 else pack_signs(diagonal)


def _energy(member: Prepared, rows: Tensor) -> Tensor:
    """tr(H_O A H_I A^T) of A in unit rows; products in float32, their sum in float64."""
    weighed = rows @ member.moments
    if not member.output_moments:
        return ((weighed * member.rms).double() * rows * member.rms).sum()
    total, start = torch.zeros((), dtype=torch.float64, device=rows.device), 0
    for block in member.output_moments:
        part = slice(start, start + len(block))
        total += ((block @ weighed[part]).double() * rows[part]).sum()
        start = part.stop
    return total


def _ratio(error: Tensor, energy: Tensor) -> float:
    return float(error / energy) if float(energy) else 0.0
