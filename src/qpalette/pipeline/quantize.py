"""The story: a checkpoint and a plan in, a quantized model directory out; kill it at any moment, run it again."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch

from qpalette.artifact import PackedCheckpoint, model_card, open_artifact
from qpalette.checkpoint import Checkpoint, export_checkpoint
from qpalette.checkpoint.export import MAX_SHARD_BYTES
from qpalette.core.errors import ArtifactError, InputError
from qpalette.kernels import select
from qpalette.kernels.device import parse_device
from qpalette.pipeline.calibrated import encode_linears
from qpalette.pipeline.encode import EncodedLinear, Quality, encode_linear
from qpalette.pipeline.hessians import HessianStore
from qpalette.pipeline.jobs import HEADROOM_BYTES, Job, format_of, make_jobs
from qpalette.pipeline.partial import PartialResults
from qpalette.pipeline.report import REPORT_FILE, LinearResult, QuantizeReport
from qpalette.plan import PLAN_FILE, Plan
from qpalette.quantizers.feedback import DAMPING


class Progress(Protocol):
    """Called after each linear; those that an earlier run finished come first, at once."""

    def __call__(self, done_weights: int, total_weights: int, linear: str, distortion: float) -> None: ...


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output_dir: str | Path,
    plan: Plan,
    *,
    hessians: HessianStore | None = None,
    damping: float = DAMPING,
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

    With `hessians` rounding is calibrated: errors are fed back with `damping` (LDLQ), which lowers the error of each
    layer's output on text like the calibration's, at the same size. Without, no data is needed.

    Raises SpecError when the plan does not fit the checkpoint, UnsupportedError when no backend encodes on `device`,
    ArtifactError when the output exists, InputError when the disk is too full, CheckpointError naming the tensor when a
    weight is not finite or too large, and HessianError naming the group when Hessians are missing, of another model, or
    not usable. InputError also tells of a `device` that is not there.
    """
    output, device = Path(output_dir).expanduser().resolve(), parse_device(device)
    jobs = make_jobs(checkpoint, plan, hessians, damping)
    for spec in set(plan.specs.values()):
        select("encode", spec, device)
    _check_output(output, overwrite)
    partial = PartialResults(output.with_name(output.name + ".partial"), jobs)
    partial.open()
    packed = PackedCheckpoint(checkpoint, format_of(checkpoint, plan, jobs, hessians), partial.read)
    _check_disk(packed, jobs, partial)

    encode = functools.partial(_encode, checkpoint, device, hessians, damping)
    qualities = _quantize_linears(_batches(jobs), partial, encode, progress)

    calibration = None if hessians is None else hessians.calibration
    results = [LinearResult(job.name, job.record, *qualities[job.name]) for job in jobs]
    report = QuantizeReport(output, results, packed.total_bytes, plan.digest, checkpoint.fingerprint, calibration)
    write_documents(packed, report, plan, base_model)
    export_checkpoint(packed, partial.assembled, max_shard_bytes)
    open_artifact(partial.assembled)  # what was written is read back before anything is replaced
    _check_output(output, overwrite)
    _put_in_place(partial, output)
    return report


def _batches(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that are encoded together: with Hessians those of a group, else each alone."""
    return [list(batch) for _, batch in groupby(jobs, key=lambda job: job.group.name if job.calibrated else job.name)]


def _encode(
    checkpoint: Checkpoint, device: torch.device, hessians: HessianStore | None, damping: float, jobs: Sequence[Job]
) -> list[EncodedLinear]:
    weights = [checkpoint.read(f"{job.name}.weight") for job in jobs]
    if hessians is not None and jobs[0].calibrated:
        return encode_linears(jobs, weights, hessians.read(jobs[0].group), damping, device)
    return [encode_linear(job.name, w, job.record, job.signs(), device) for job, w in zip(jobs, weights, strict=True)]


def _quantize_linears(
    batches: Sequence[Sequence[Job]],
    partial: PartialResults,
    encode: Callable[[Sequence[Job]], list[EncodedLinear]],
    progress: Progress | None,
) -> dict[str, Quality]:
    """The quality of each linear, whose tensors are then in `partial`; the jobs of a batch are encoded together."""
    jobs = [job for batch in batches for job in batch]
    qualities: dict[str, Quality] = {}
    total, done = sum(job.linear.weights for job in jobs), 0

    def finish(job: Job, quality: Quality) -> None:
        nonlocal done
        qualities[job.name] = quality
        done += job.linear.weights
        if progress is not None:
            progress(done, total, job.name, quality.distortion)

    for job in jobs:
        if (found := partial.quality(job)) is not None:
            finish(job, found)
    to_do = [[job for job in batch if job.name not in qualities] for batch in batches]
    for batch in filter(None, to_do):
        for job, encoded in zip(batch, encode(batch), strict=True):
            partial.save(job, encoded)
            finish(job, encoded.quality)
    return qualities


def write_documents(packed: PackedCheckpoint, report: QuantizeReport, plan: Plan, base_model: str | None) -> None:
    """Report, plan and model card, to lie beside the tokenizer."""
    records = {linear.name: linear.record for linear in report.linears}
    distortions = {linear.name: linear.distortion for linear in report.linears}
    carried_bytes = packed.total_bytes - packed.packed_bytes
    measured = report.calibration
    calibration = None if measured is None else (measured.tokens, measured.text_sha256)
    card = model_card(report.output.name, packed.config, records, distortions, carried_bytes, base_model, calibration)
    packed.documents.update({REPORT_FILE: report.to_json(), PLAN_FILE: plan.to_json(), "README.md": card})


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
    to_do = sum(job.packed_bytes for job in jobs if partial.quality(job) is None)
    needed = packed.total_bytes + to_do + HEADROOM_BYTES
    available = shutil.disk_usage(partial.directory).free
    if available < needed:
        raise InputError(
            f"{partial.directory.parent} needs {needed / 1e9:.2f} GB of free disk, {available / 1e9:.2f} GB are "
            "available; free some, or choose another output directory"
        )
