"""The story: a checkpoint and a plan in, a quantized model directory out; kill it at any moment, run it again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from qpalette.artifact import PackedCheckpoint, model_card, open_artifact
from qpalette.checkpoint import Checkpoint, export_checkpoint
from qpalette.checkpoint.export import MAX_SHARD_BYTES
from qpalette.core.errors import ArtifactError, InputError
from qpalette.kernels import select
from qpalette.pipeline.encode import encode_linear
from qpalette.pipeline.jobs import HEADROOM_BYTES, Job, format_of, make_jobs
from qpalette.pipeline.partial import PartialResults
from qpalette.pipeline.report import REPORT_FILE, LinearResult, QuantizeReport
from qpalette.plan import Plan


class Progress(Protocol):
    """Called after each linear; those that an earlier run finished come first, at once."""

    def __call__(self, done_weights: int, total_weights: int, linear: str, distortion: float) -> None: ...


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output_dir: str | Path,
    plan: Plan,
    *,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    base_model: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Quantize the linears that `plan` names, carry everything else over, and put the result at `output_dir`.

    Finished linears wait in `<output_dir>.partial`; a second run with the same plan and source goes on from there and
    gives the same bytes as an uninterrupted one. `output_dir` appears whole, by one rename. `overwrite` replaces an
    existing quantized model, and nothing else. `base_model` is the Hub name that the model card states.

    Raises SpecError when the plan does not fit the checkpoint, UnsupportedError when no backend encodes on `device`,
    ArtifactError when the output exists, InputError when the disk is too full, and CheckpointError naming the tensor
    when a weight is not finite or too large.
    """
    output, device = Path(output_dir).expanduser().resolve(), torch.device(device)
    jobs = make_jobs(checkpoint, plan)
    for spec in set(plan.specs.values()):
        select("encode", spec, device)
    _check_output(output, overwrite)
    partial = PartialResults(output.with_name(output.name + ".partial"), jobs)
    partial.open()
    packed = PackedCheckpoint(checkpoint, format_of(checkpoint, plan, jobs), partial.read)
    _check_disk(packed, jobs, partial)

    distortions = _quantize_linears(checkpoint, jobs, partial, device, progress)

    results = [LinearResult(job.name, job.record, distortions[job.name]) for job in jobs]
    report = QuantizeReport(output, results, packed.total_bytes, plan.digest, checkpoint.fingerprint)
    _write_documents(packed, report, base_model)
    export_checkpoint(packed, partial.assembled, max_shard_bytes)
    open_artifact(partial.assembled)  # what was written is read back before anything is replaced
    _check_output(output, overwrite)
    _put_in_place(partial, output)
    return report


def _quantize_linears(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    partial: PartialResults,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, float]:
    """The distortion of each linear, whose tensors are then in `partial`."""
    distortions = {job.name: found for job in jobs if (found := partial.distortion(job)) is not None}
    total, done = sum(job.linear.weights for job in jobs), 0
    for job in sorted(jobs, key=lambda job: job.name not in distortions):
        if job.name not in distortions:
            weight = checkpoint.read(f"{job.name}.weight")
            encoded = encode_linear(job.name, weight, job.record, job.signs(), device)
            partial.save(job, encoded)
            distortions[job.name] = encoded.distortion
        done += job.linear.weights
        if progress is not None:
            progress(done, total, job.name, distortions[job.name])
    return distortions


def _write_documents(packed: PackedCheckpoint, report: QuantizeReport, base_model: str | None) -> None:
    records = {linear.name: linear.record for linear in report.linears}
    distortions = {linear.name: linear.distortion for linear in report.linears}
    carried_bytes = packed.total_bytes - packed.packed_bytes
    card = model_card(report.output.name, packed.config, records, distortions, carried_bytes, base_model)
    packed.documents.update({REPORT_FILE: report.to_json(), "README.md": card})


def _put_in_place(partial: PartialResults, output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        shutil.rmtree(partial.replaced, ignore_errors=True)
        os.replace(output, partial.replaced)
    os.replace(partial.assembled, output)
    partial.remove()


def _check_output(output: Path, overwrite: bool) -> None:
    """A missing or empty directory will do; only a quantized model is ever overwritten."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ArtifactError(f"{output} exists already; choose another directory, or overwrite it (--overwrite)")
    try:
        open_artifact(output)
    except ArtifactError as error:
        raise ArtifactError(f"{output} is not overwritten, since it is no quantized model: {error}") from error


def _check_disk(packed: PackedCheckpoint, jobs: Sequence[Job], partial: PartialResults) -> None:
    """Finished linears and the assembled model are on disk together for a while."""
    to_do = sum(job.packed_bytes for job in jobs if partial.distortion(job) is None)
    needed = packed.total_bytes + to_do + HEADROOM_BYTES
    available = shutil.disk_usage(partial.directory).free
    if available < needed:
        raise InputError(
            f"{partial.directory.parent} needs {needed / 1e9:.2f} GB of free disk, {available / 1e9:.2f} GB are "
            "available; free some, or choose another output directory"
        )
