"""Bytes on disk and in memory of a quantized model that does not exist yet."""

from __future__ import annotations

from pathlib import Path

from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.rounding import ROUNDING, Rounding
from qpalette.formats import PackedCheckpoint, checksums_bytes, total_bits
from qpalette.pipeline.jobs import format_of, make_jobs, no_tensor
from qpalette.pipeline.quantize import write_documents
from qpalette.pipeline.report import LinearResult, QuantizeReport
from qpalette.plan import Plan
from qpalette.storage import Checkpoint
from qpalette.storage.export import exported_bytes, exported_names

LONGEST = 1.2345678901234567e-05  # as many digits as a measured figure of the report can have


def disk_bytes(
    checkpoint: Checkpoint, plan: Plan, hessians: HessianStore | None = None, rounding: Rounding = ROUNDING
) -> int:
    """All files of the directory that `quantize_checkpoint` writes, from headers alone; never too few.

    Exact but for the figures that are measured on the way: their digits are counted as long as they can be.
    Raises as `make_jobs`.
    """
    jobs = make_jobs(checkpoint, plan, hessians, rounding)
    packed = PackedCheckpoint(checkpoint, format_of(checkpoint, plan, jobs, hessians), no_tensor)
    proxy = None if hessians is None else LONGEST
    results = [LinearResult(job.name, job.record, LONGEST, proxy) for job in jobs]
    calibration = None if hessians is None else hessians.calibration
    output = Path("\\" * 255)  # the longest name, each of its characters escaped where the model card repeats it
    report = QuantizeReport(
        *(output, results, packed.total_bytes, plan.digest, checkpoint.fingerprint, packed.shares, calibration)
    )
    write_documents(packed, report, plan, base_model=None)
    beside = {**checkpoint.side_files, **{name: len(text.encode()) for name, text in packed.documents.items()}}
    return exported_bytes(packed) + sum(beside.values()) + checksums_bytes([*beside, *exported_names(packed)])


def carried_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """All tensors but those of the quantized linears."""
    jobs = make_jobs(checkpoint, plan)
    packed = PackedCheckpoint(checkpoint, format_of(checkpoint, plan, jobs), no_tensor)
    return packed.total_bytes - total_bits(job.record for job in jobs).total // 8
