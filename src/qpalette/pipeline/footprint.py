"""Bytes on disk and on a device of a quantized model that does not exist yet."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qpalette.artifact import PackedCheckpoint
from qpalette.checkpoint import Checkpoint
from qpalette.checkpoint.export import exported_bytes
from qpalette.pipeline.hessians import HessianStore
from qpalette.pipeline.jobs import Job, format_of, make_jobs, no_tensor
from qpalette.pipeline.quantize import write_documents
from qpalette.pipeline.report import LinearResult, QuantizeReport
from qpalette.plan import Overhead, Plan, device_bytes

LONGEST = 1.2345678901234567e-05  # as many digits as a measured figure of the report can have


def disk_bytes(checkpoint: Checkpoint, plan: Plan, hessians: HessianStore | None = None) -> int:
    """All files of the directory that `quantize_checkpoint` writes, from headers alone; never too few.

    Exact but for the digits of the figures in the report, which are not known yet and taken as long as they can be.
    """
    jobs = make_jobs(checkpoint, plan, hessians)
    packed = PackedCheckpoint(checkpoint, format_of(checkpoint, plan, jobs, hessians), no_tensor)
    proxy = None if hessians is None else LONGEST
    results = [LinearResult(job.name, job.record, LONGEST, proxy) for job in jobs]
    calibration = None if hessians is None else hessians.calibration
    report = QuantizeReport(Path("model"), results, packed.total_bytes, plan.digest, checkpoint.fingerprint, calibration)
    write_documents(packed, report, plan, None)
    with tempfile.TemporaryDirectory() as directory:
        packed.save_side_files(Path(directory))
        beside = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    return exported_bytes(packed) + beside


def packed_bytes(jobs: list[Job]) -> int:
    return sum(job.packed_bytes for job in jobs)


def overhead(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    plan: Plan,
    hessians: HessianStore | None = None,
    context: int | None = None,
    batch: int = 1,
) -> Overhead:
    raise NotImplementedError
