"""The part of quantizing that can run anywhere: jobs of one batch in, packed tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from qpalette.calibration.equalize import equalize
from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.rounding import Prepared, Rounding, input_diagonal, prepare
from qpalette.core.errors import CheckpointError, InputError
from qpalette.core.records import LinearGroup, LinearRecord
from qpalette.models import read_weight
from qpalette.pipeline.calibrated import encode_linears
from qpalette.pipeline.encode import (
    BATCH_BYTES,
    GPU_SHARE,
    EncodedLinear,
    check_finite,
    encode_linear,
    feedback_bytes,
)
from qpalette.pipeline.jobs import Job
from qpalette.pipeline.partial import digest_of
from qpalette.rotate import Rotation
from qpalette.storage import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Work:
    """What all batches share, small enough to be sent to another process or host."""

    location: Path  # of the checkpoint, the same on every host
    fingerprint: str
    hessians: HessianStore | None
    rounding: Rounding
    threads: int  # of torch: the rounding of a factorized Hessian depends on it, nothing else does

    def open(self) -> Checkpoint:
        """The checkpoint, opened once per process. Raises CheckpointError when it is another one here."""
        checkpoint = _open(self.location)
        if checkpoint.fingerprint != self.fingerprint:
            raise CheckpointError(f"{self.location} holds another model on this host; give all hosts the same files")
        return checkpoint


class Source(NamedTuple):
    """A linear's weight [M, K] as it was read, on the CPU."""

    weight: torch.Tensor
    digest: str


def read_sources(checkpoint: Checkpoint, jobs: Sequence[Job]) -> list[Source]:
    """Raises CheckpointError as `read_weight`."""
    weights = [read_weight(checkpoint, job.name) for job in jobs]
    return [Source(weight, digest_of(weight)) for weight in weights]


def encode_batch(
    work: Work, jobs: Sequence[Job], sources: Sequence[Source], device: torch.device
) -> list[EncodedLinear]:
    """Jobs that belong together: calibrated ones of one shape and spec, or a single one.

    Raises as `encode_linear` and `encode_linears`, HessianError, and InputError when `device` has no room for them.
    """
    weights = [source.weight for source in sources]
    try:
        if jobs[0].calibrated:
            members = [_prepared(work, job, weight, device) for job, weight in zip(jobs, weights, strict=True)]
            encoded = encode_linears(jobs, members, device)
        else:
            (job,), (weight,) = jobs, weights
            encoded = [encode_linear(job.name, weight, job.record, job.signs(), device)]
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{device} has no memory left for {jobs[0].group.name} (inputs: {jobs[0].group.in_features}): free some "
            "of it, or use --device cpu; finished linears are kept"
        ) from error
    return [replace(e, weight_digest=source.digest) for e, source in zip(encoded, sources, strict=True)]


def batches_of(jobs: Sequence[Job], device: torch.device) -> list[tuple[Job, ...]]:
    """Jobs that are encoded together: each alone, but calibrated ones of one shape and spec as far as there is room."""
    room = BATCH_BYTES if device.type != "cuda" else torch.cuda.mem_get_info(device)[1] // GPU_SHARE
    batches: list[list[Job]] = []
    open_of: dict[LinearRecord, tuple[list[Job], int]] = {}
    for job in jobs:
        alike = replace(job.record, group="", seed=0, source=())
        size = feedback_bytes(job.linear)
        batch, used = open_of.get(alike, ([], room))
        if not job.calibrated or used + size > room:
            batch, used = [], 0
            batches.append(batch)
        batch.append(job)
        if job.calibrated:
            open_of[alike] = (batch, used + size)
    return [tuple(batch) for batch in batches]


def _prepared(work: Work, job: Job, weight: torch.Tensor, device: torch.device) -> Prepared:
    assert work.hessians is not None
    check_finite(job.name, weight)
    scale = _scale_of(work.location, work.fingerprint, job.group) if work.rounding.equalize else None
    diagonal = input_diagonal(scale, job.signs().to(device))
    rotation = Rotation.parse(job.record.rotation, job.linear.in_features)
    hessian, outputs = work.hessians.read(job.group, job.name), work.hessians.read_outputs(job.group, job.name)
    return prepare(job.name, weight, rotation, diagonal, hessian, outputs, work.rounding)


@lru_cache(maxsize=256)
def _scale_of(location: Path, fingerprint: str, group: LinearGroup) -> torch.Tensor:
    """S of a group, from the weights of all its linears: those that are not quantized count as well."""
    checkpoint = _open(location)
    return equalize([read_weight(checkpoint, linear.name) for linear in group.linears])


@lru_cache(maxsize=1)
def _open(location: Path) -> Checkpoint:
    return open_checkpoint(location)
