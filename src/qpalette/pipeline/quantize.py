"""The story: a checkpoint and a plan in, a quantized model directory out; kill it at any moment, run it again."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch

from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.learned_signs import learn_seeds
from qpalette.calibration.rounding import ROUNDING, Rounding
from qpalette.core.ahead import ahead
from qpalette.core.errors import InputError
from qpalette.formats import (
    BITS_MAP,
    PARETO,
    PackedCheckpoint,
    bits_map,
    model_card,
    open_artifact,
    pareto,
    write_checksums,
)
from qpalette.models import check_complete, transposed_modules
from qpalette.pipeline.encode import Quality, tell_of_faint_rows
from qpalette.pipeline.jobs import HEADROOM_BYTES, WRITING_THREADS, Job, format_of, make_jobs, planned_result
from qpalette.pipeline.output import Output
from qpalette.pipeline.partial import PartialResults
from qpalette.pipeline.rehearsal import rehearse
from qpalette.pipeline.report import REPORT_FILE, LinearResult, QuantizeReport
from qpalette.pipeline.work import Work, batches_of, encode_batch, read_sources
from qpalette.pipeline.workers import Batch, Result, run_in_processes
from qpalette.plan import PLAN_FILE, Plan
from qpalette.rotate import Rotation
from qpalette.runtime import select
from qpalette.runtime.device import parse_device
from qpalette.storage import Checkpoint, export_checkpoint
from qpalette.storage.export import MAX_SHARD_BYTES

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Called after each linear; those that an earlier run finished come first, at once."""

    def __call__(self, done_weights: int, total_weights: int, linear: str, distortion: float) -> None: ...


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output_dir: str | Path,
    plan: Plan,
    *,
    hessians: HessianStore | None = None,
    rounding: Rounding = ROUNDING,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    base_model: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = 1,
    ray: str | None = None,
    sign_seeds: int = 1,
) -> QuantizeReport:
    """Quantize the linears that `plan` names, carry everything else over, and put the result at `output_dir`.

    Finished linears wait in `<output_dir>.partial`; a second run with the same plan and source goes on from there and
    gives the same bytes as an uninterrupted one. `output_dir` appears whole, by one rename (a mount point: `Output`).
    `overwrite` replaces an existing quantized model, and nothing else. One run at a time may write it. `base_model` is
    the Hub name that the model card states.

    With `hessians` rounding is calibrated: errors are fed back as `rounding` says (LDLQ, on the sides that were
    measured), which lowers what they cost on text like the calibration's, at the same rate; columns are equalized, for
    16 bits per input. Without, no data is needed.

    With `sign_seeds` N, which needs Hessians, each group's rotation has the best of N seeds for its signs.
    `workers` processes share the linears, and the GPUs of this host where `device` is "cuda"; with `ray`, a cluster's
    address or "local", they run in Ray. The result is the same, to the byte.

    Raises SpecError when the plan does not fit the checkpoint, UnsupportedError when no backend encodes on `device`,
    ArtifactError when the output exists, InputError when the disk is too full, CheckpointError naming the tensor when
    one is missing, not finite or too large, and HessianError naming the group when Hessians are missing, of another
    model, or not usable. InputError also tells of another run that writes the output, of a `device` that is not there,
    and of workers that keep dying.
    """
    output, device = Output(Path(output_dir).expanduser().resolve(), overwrite), parse_device(device)
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    with output.claimed(), _cluster(ray, workers):  # what cannot be reached is told before the work
        jobs = rehearsed_jobs(checkpoint, plan, hessians, rounding)
        for spec in set(plan.specs.values()):
            select("encode", spec, device)
        if sign_seeds > 1:
            seeds = _learned(jobs, hessians, plan, sign_seeds, rounding.damping, device)
            jobs = make_jobs(checkpoint, plan, hessians, rounding, seeds)
        check_complete(checkpoint)
        partial = PartialResults(output.work, jobs)
        packed = PackedCheckpoint(checkpoint, format_of(checkpoint, plan, jobs, hessians), partial.read)
        checkpoint.check_values(packed.carried)
        partial.open(checkpoint)
        _check_disk(packed, jobs, partial)
        _warn(packed, checkpoint, jobs)
        with _full_disk_is_told(partial):
            work = Work(checkpoint.location, checkpoint.fingerprint, hessians, rounding, torch.get_num_threads())
            qualities = _quantize_linears(
                jobs,
                partial,
                device,
                lambda batches: _finished(work, checkpoint, batches, workers, ray is not None, device),
                progress,
            )
            partial.check_source(checkpoint)
            calibration = None if hessians is None else hessians.calibration
            report = QuantizeReport(
                *(output.directory, _results(jobs, qualities), packed.total_bytes, plan.digest),
                *(checkpoint.fingerprint, packed.shares, calibration),
            )
            write_documents(packed, report, plan, base_model)
            export_checkpoint(packed, partial.assembled, max_shard_bytes, WRITING_THREADS)
            open_artifact(partial.assembled)  # what was written is read back before anything is replaced
            write_checksums(partial.assembled)
        output.put(partial.assembled)
        partial.remove()
    return report


def rehearsed_jobs(
    checkpoint: Checkpoint, plan: Plan, hessians: HessianStore | None = None, rounding: Rounding = ROUNDING
) -> list[Job]:
    """The work of a plan whose result transformers could load and run. Raises as `make_jobs` and `rehearse`."""
    jobs = make_jobs(checkpoint, plan, hessians, rounding)
    rehearse(checkpoint, planned_result(checkpoint, plan, jobs, hessians), {job.name: job.record for job in jobs})
    return jobs


def _warn(packed: PackedCheckpoint, checkpoint: Checkpoint, jobs: Sequence[Job]) -> None:
    """Of what is right, and may not be what is expected."""
    if (warning := packed.shares.warning()) is not None:
        logger.warning("%s: %s", checkpoint.location.name, warning)
    if transposed := transposed_modules(checkpoint, (job.name for job in jobs)):
        logger.warning(
            "%s and %d more are Conv1D, stored transposed: in the result their rows are outputs, as in any other "
            "linear",
            *(transposed[0], len(transposed) - 1),
        )


def _results(jobs: Sequence[Job], qualities: Mapping[str, Quality]) -> list[LinearResult]:
    measured = ((job, qualities[job.name]) for job in jobs)
    return [LinearResult(job.name, job.record, found.distortion, found.proxy) for job, found in measured]


def _learned(
    jobs: Sequence[Job], hessians: HessianStore | None, plan: Plan, count: int, damping: float, device: torch.device
) -> dict[str, int]:
    if hessians is None:
        raise InputError("signs can be fitted to Hessians only; collect them with `qpalette calibrate`")
    groups = {job.group.name: job for job in jobs if job.calibrated}
    rotations = [(job.group, Rotation.parse(job.record.rotation, job.record.in_features)) for job in groups.values()]
    return learn_seeds(rotations, hessians, plan.seed, count, damping, device)


@contextmanager
def _full_disk_is_told(partial: PartialResults) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"the disk of {partial.directory} is full; finished linears are kept there: free some space and run the "
            "same command again"
        ) from error


def _cluster(address: str | None, workers: int) -> AbstractContextManager[None]:
    if address is None:
        return nullcontext()
    from qpalette.pipeline.ray_workers import connected

    return connected(address, workers)


def _finished(
    work: Work, checkpoint: Checkpoint, batches: Sequence[Batch], workers: int, in_ray: bool, device: torch.device
) -> Iterator[Result]:
    """Batches and their packed tensors, as they are finished: here, in processes of this host, or in a Ray cluster."""
    if in_ray:
        from qpalette.pipeline.ray_workers import run_in_ray

        return run_in_ray(work, batches, workers, device)
    if workers > 1:
        return run_in_processes(work, batches, workers, device)
    read = ahead(lambda batch: read_sources(checkpoint, batch), batches)
    return ((batch, encode_batch(work, batch, sources, device)) for batch, sources in read)


def _quantize_linears(
    jobs: Sequence[Job],
    partial: PartialResults,
    device: torch.device,
    finished: Callable[[Sequence[Batch]], Iterator[Result]],
    progress: Progress | None,
) -> dict[str, Quality]:
    """The quality of each linear, whose tensors are then in `partial`; `finished` runs what is still to do."""
    qualities: dict[str, Quality] = {}
    total, done = sum(job.linear.weights for job in jobs), 0

    def finish(job: Job, quality: Quality) -> None:
        nonlocal done
        qualities[job.name] = quality
        tell_of_faint_rows(job.linear, quality)
        done += job.linear.weights
        if progress is not None:
            progress(done, total, job.name, quality.distortion)

    for job in jobs:
        if (found := partial.quality(job)) is not None:
            finish(job, found)

    def save(result: Result) -> None:
        for job, packed in zip(*result, strict=True):
            partial.save(job, packed)

    to_do = batches_of([job for job in jobs if job.name not in qualities], device)
    for (batch, encoded), _ in ahead(save, finished(to_do)):
        for job, packed in zip(batch, encoded, strict=True):
            finish(job, packed.quality)
    return qualities


def write_documents(packed: PackedCheckpoint, report: QuantizeReport, plan: Plan, base_model: str | None) -> None:
    """Report, plan, model card and its pictures, to lie beside the tokenizer."""
    records = {linear.name: linear.record for linear in report.linears}
    distortions = {linear.name: linear.distortion for linear in report.linears}
    carried_bytes = packed.total_bytes - packed.packed_bytes
    measured, predicted = report.calibration, pareto(records, plan.sensitivities)
    calibration = None if measured is None else (measured.tokens, measured.text_sha256)
    card = model_card(
        *(report.output.name, packed.config, records, distortions, carried_bytes, base_model, calibration),
        shares=report.shares,
        has_pareto=predicted is not None,
    )
    documents = {REPORT_FILE: report.to_json(), PLAN_FILE: plan.to_json(), "README.md": card}
    pictures = {BITS_MAP: bits_map(records)} | ({} if predicted is None else {PARETO: predicted})
    packed.documents.update(documents | pictures)


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
