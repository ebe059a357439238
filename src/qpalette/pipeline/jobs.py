"""The work that a plan means for a checkpoint, known and checked before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version

import torch

from qpalette.calibration.feedback import DAMPING_RULE
from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.rounding import ROUNDING, Rounding
from qpalette.codes import parse_spec
from qpalette.core.errors import SpecError
from qpalette.core.records import SIGNS, LinearGroup, LinearRecord, LinearShape, PackedBits
from qpalette.formats import FORMAT_VERSION, PackedCheckpoint, QuantizationFormat, counted_bits, total_bits
from qpalette.models import Grouping, find_groups, tensors_of, weight_bytes, whole_of
from qpalette.models.multiplied import Shares
from qpalette.pipeline.encode import BATCH_BYTES, feedback_bytes, working_bytes
from qpalette.plan import Plan, select_linears
from qpalette.rotate import random_signs, rotation_for
from qpalette.storage import Checkpoint, held_bytes

WRITING_THREADS = 4  # files of the result at once
VERSION = version("qpalette")  # read from files: not for each linear again
HEADROOM_BYTES = 64 << 20  # tokenizer, headers, documents


@dataclass(frozen=True)
class Job:
    """One linear to quantize. Equal digests, and only those, mean equal packed tensors."""

    linear: LinearShape
    group: LinearGroup  # its linears share the signs, named after it, and the Hessian
    record: LinearRecord
    digest: str
    calibrated: bool = False  # rounding uses the group's Hessian

    @property
    def name(self) -> str:
        return self.linear.name

    @property
    def packed_bytes(self) -> int:
        return counted_bits(self.record).total // 8

    def signs(self) -> torch.Tensor:
        """int8 [K] of +-1."""
        return random_signs(self.linear.in_features, self.record.seed, self.group.name)


@dataclass(frozen=True)
class Estimate:
    """What quantizing will take and give; sizes of the result are exact."""

    linears: int
    weights: int  # in the linears that the plan names
    bits: PackedBits
    specs: Mapping[str, int]  # weights by spec
    source_bytes: int  # all tensors of the source
    tensor_bytes: int  # all tensors of the result
    disk_bytes: int  # free space that a run from the start asks for
    peak_memory_bytes: int  # of tensors, about; a backend's search tables come on top
    shares: Shares  # of what multiplies, how much the result has packed
    seconds: float | None = None  # about, from a trial on this machine (`forecast_seconds`); None when nobody tried

    @property
    def rate(self) -> Fraction:
        """Average bits per quantized weight, everything counted."""
        return self.bits.rate


def make_jobs(
    checkpoint: Checkpoint,
    plan: Plan,
    hessians: HessianStore | None = None,
    rounding: Rounding = ROUNDING,
    seeds: Mapping[str, int] | None = None,
) -> list[Job]:
    """One job per linear of the plan, in layer order. `seeds` has those of groups that do not take the plan's.

    Raises SpecError when the plan names no linear of the checkpoint or its rotation does not suit one, and
    HessianError when `hessians` belong to another model or lack a group.
    """
    grouping = find_groups(checkpoint)
    groups = grouping.all_groups
    group_of = {linear.name: group for group in groups for linear in group.linears}
    fingerprint = checkpoint.fingerprint
    if hessians is not None:
        hessians.check_source(fingerprint)
    jobs = []
    launch_of = _launches(plan, groups)
    _check_whole(checkpoint, plan, groups)
    for linear in select_linears(plan, groups):
        rotation = rotation_for(linear.in_features, plan.rotation).name
        spec = plan.specs[linear.name]
        group = group_of[linear.name]
        seed = (seeds or {}).get(group.name, plan.seed)
        # Nobody measures what reads an embedding: its rows are looked up.
        calibrated = hessians is not None and group not in grouping.optional
        record = LinearRecord(
            *(spec, linear.out_features, linear.in_features, rotation, seed, launch_of[linear.name]),
            rounding.diagonal if calibrated else SIGNS,
            _source(checkpoint, linear.name),
        )
        feedback: list[str | float] = []
        if hessians is not None and calibrated:
            feedback = [hessians.identity(group), rounding.damping, rounding.output_damping, DAMPING_RULE]
        digest = _digest(linear, group.name, record, fingerprint, feedback)
        jobs.append(Job(linear, group, record, digest, calibrated))
    return jobs


def _launches(plan: Plan, groups: Sequence[LinearGroup]) -> dict[str, str]:
    """Linear -> the id that those of its launch share: its group's name, or where the plan cuts the group into several
    launches the name with a number."""
    numbers = {name: number for number, launch in enumerate(plan.launches) for name in launch}
    ids = {}
    for group in groups:
        named = [linear.name for linear in group.linears if linear.name in plan.specs]
        cut = any(name in numbers for name in named)
        parts = list(dict.fromkeys(numbers.get(name, name) for name in named)) if cut else []
        for name in named:
            place = f"#{parts.index(numbers.get(name, name))}" if len(parts) > 1 else ""
            ids[name] = group.name + place
    return ids


def _source(checkpoint: Checkpoint, linear: str) -> tuple[str, ...]:
    tensors = tensors_of(checkpoint, linear)
    return () if tensors == (f"{linear}.weight",) else tensors


def _check_whole(checkpoint: Checkpoint, plan: Plan, groups: Sequence[LinearGroup]) -> None:
    """What is one tensor of the checkpoint or one module of the model is packed as a whole, or not at all."""
    named: dict[str, list[bool]] = {}
    for linear in (linear for group in groups for linear in group.linears):
        named.setdefault(whole_of(checkpoint, linear.name), []).append(linear.name in plan.specs)
    for whole, chosen in named.items():
        if any(chosen) and not all(chosen):
            raise SpecError(
                f"the plan names {sum(chosen)} of {len(chosen)} linears in {whole}: name all of them, or none"
            )


def format_of(
    checkpoint: Checkpoint, plan: Plan, jobs: Sequence[Job], hessians: HessianStore | None = None
) -> QuantizationFormat:
    """What config.json will say."""
    provenance = {
        "qpalette": VERSION,
        "source": checkpoint.fingerprint,
        "plan": plan.digest,
        "effort": plan.effort,
    }
    if hessians is not None:
        provenance["calibration_tokens"] = str(hessians.calibration.tokens)
        provenance["calibration_text_sha256"] = hessians.calibration.text_sha256
    records = {job.name: job.record for job in jobs}
    return QuantizationFormat.of(records, provenance, _left_alone(find_groups(checkpoint), plan))


def planned_result(
    checkpoint: Checkpoint, plan: Plan, jobs: Sequence[Job], hessians: HessianStore | None = None
) -> PackedCheckpoint:
    """What will be written, without its values."""
    return PackedCheckpoint(checkpoint, format_of(checkpoint, plan, jobs, hessians), no_tensor)


def estimate(
    checkpoint: Checkpoint, plan: Plan, hessians: HessianStore | None = None, rounding: Rounding = ROUNDING
) -> Estimate:
    """The figures of a run without running it: headers only, no weight is read. Raises as `make_jobs`."""
    jobs = make_jobs(checkpoint, plan, hessians, rounding)
    result = planned_result(checkpoint, plan, jobs, hessians)
    bits = total_bits(job.record for job in jobs)
    specs: Counter[str] = Counter()
    for job in jobs:
        specs[job.record.spec] += job.linear.weights
    return Estimate(
        linears=len(jobs),
        weights=bits.weights,
        bits=bits,
        specs=dict(sorted(specs.items())),
        source_bytes=checkpoint.total_bytes,
        tensor_bytes=result.total_bytes,
        disk_bytes=result.total_bytes + result.packed_bytes + HEADROOM_BYTES,
        peak_memory_bytes=_peak_memory(checkpoint, jobs, held_bytes(result, WRITING_THREADS)),
        shares=result.shares,
    )


def _peak_memory(checkpoint: Checkpoint, jobs: Sequence[Job], written: int) -> int:
    """The largest linear with its codes and one chunk in flight, and the tensors that are `written` at the same time:
    what one has used stays with the allocator. With Hessians a whole batch is in flight.
    """

    def of_job(job: Job) -> int:
        chunk = working_bytes(job.linear.weights, parse_spec(job.record.spec).rate)
        together = max(BATCH_BYTES, feedback_bytes(job.linear)) if job.calibrated else 0
        return weight_bytes(checkpoint, job.linear) + 2 * job.packed_bytes + chunk + together

    return written + max(map(of_job, jobs))


def _left_alone(grouping: Grouping, plan: Plan) -> list[str]:
    """Modules that stay as they are; a tied output head has no tensor of its own, but is a module."""
    names = {name.removesuffix(".weight") for name in grouping.reasons if name.endswith(".weight")}
    names |= {linear.name for group in grouping.groups for linear in group.linears}
    head = set() if any(group.name in plan.specs for group in grouping.optional) else {"lm_head"}
    return sorted((names | head) - plan.specs.keys())


def _digest(
    linear: LinearShape, group: str, record: LinearRecord, fingerprint: str, feedback: Sequence[str | float]
) -> str:
    what = [
        *(FORMAT_VERSION, VERSION, fingerprint, linear.name, group),
        *(record.spec, record.out_features, record.in_features, record.rotation, record.seed, record.diagonal),
        *feedback,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def no_tensor(linear: str, suffix: str) -> torch.Tensor:
    """Stands for the reader of packed tensors where only headers are asked for."""
    raise AssertionError("an estimate reads nothing")
