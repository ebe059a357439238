"""The part of quantizing that can run anywhere: jobs of one batch in, packed tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from qpalette.calibration.hessians import HessianStore
from qpalette.core.errors import CheckpointError, InputError
from qpalette.models import read_weight
from qpalette.pipeline.calibrated import encode_linears
from qpalette.pipeline.encode import EncodedLinear, encode_linear
from qpalette.pipeline.jobs import Job
from qpalette.pipeline.partial import sha256_of
from qpalette.storage import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Work:
    """What all batches share, small enough to be sent to another process or host."""

    location: Path  # of the checkpoint, the same on every host
    fingerprint: str
    hessians: HessianStore | None
    damping: float
    threads: int  # of torch: the rounding of a factorized Hessian depends on it, nothing else does

    def open(self) -> Checkpoint:
        """The checkpoint, opened once per process. Raises CheckpointError when it is another one here."""
        checkpoint = _open(self.location)
        if checkpoint.fingerprint != self.fingerprint:
            raise CheckpointError(f"{self.location} holds another model on this host; give all hosts the same files")
        return checkpoint


def encode_batch(work: Work, checkpoint: Checkpoint, jobs: Sequence[Job], device: torch.device) -> list[EncodedLinear]:
    """Jobs that belong together: the calibrated ones of a group, or a single one.

    Raises as `encode_linear` and `encode_linears`, and InputError when `device` has no room for the group.
    """
    weights = [read_weight(checkpoint, job.name) for job in jobs]
    try:
        if work.hessians is not None and jobs[0].calibrated:
            encoded = encode_linears(jobs, weights, work.hessians.read(jobs[0].group), work.damping, device)
        else:
            (job,), (weight,) = jobs, weights
            encoded = [encode_linear(job.name, weight, job.record, job.signs(), device)]
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{device} has no memory left for {jobs[0].group.name} (inputs: {jobs[0].group.in_features}): free some "
            "of it, or use --device cpu; finished linears are kept"
        ) from error
    return [replace(e, weight_sha256=sha256_of(w)) for e, w in zip(encoded, weights, strict=True)]


@lru_cache(maxsize=1)
def _open(location: Path) -> Checkpoint:
    return open_checkpoint(location)
