"""How long quantizing will take here: a few tiles of noise are encoded as the weights will be, and timed."""

from __future__ import annotations

import time

import torch

from qpalette.core.records import TILE
from qpalette.pipeline.encode import encode_linear
from qpalette.pipeline.jobs import Job, make_jobs
from qpalette.plan import Plan
from qpalette.runtime.device import parse_device
from qpalette.storage import Checkpoint

TRIAL_SECONDS = 1.0  # for each quantizer, after compiling
LEAST_ROWS, MOST_ROWS = TILE, 1 << 14
COPY_BYTES_PER_SECOND = 400e6  # reading, hashing and writing what is not computed, with both cores of an EPYC


def forecast_seconds(checkpoint: Checkpoint, plan: Plan, device: str | torch.device = "cpu") -> float:
    """Seconds that `quantize_checkpoint` will take without Hessians and by one worker; reads no weight.

    Each quantizer of the plan is tried on its widest linear's inputs. Raises as `make_jobs`, and UnsupportedError when
    no backend encodes on `device`.
    """
    jobs = make_jobs(checkpoint, plan)
    target = parse_device(device)
    by_spec: dict[str, list[Job]] = {}
    for job in jobs:
        by_spec.setdefault(job.record.spec, []).append(job)
    encoding = sum(
        sum(job.linear.weights for job in alike) / _weights_per_second(max(alike, key=_inputs), target)
        for alike in by_spec.values()
    )
    return encoding + checkpoint.total_bytes / COPY_BYTES_PER_SECOND


def _inputs(job: Job) -> int:
    return job.linear.in_features


def _weights_per_second(job: Job, device: torch.device) -> float:
    """Doubles the rows until the trial is long enough to trust."""
    generator = torch.Generator().manual_seed(0)
    rows = LEAST_ROWS
    _seconds(job, rows, device, generator)  # compiles
    while True:
        seconds = _seconds(job, rows, device, generator)
        if seconds >= TRIAL_SECONDS / 4 or rows >= MOST_ROWS:
            return rows * job.linear.in_features / seconds
        rows *= 4


def _seconds(job: Job, rows: int, device: torch.device, generator: torch.Generator) -> float:
    weight = torch.randn(rows, job.linear.in_features, generator=generator)
    start = time.perf_counter()
    encode_linear(job.name, weight, job.record, job.signs(), device)
    return time.perf_counter() - start
