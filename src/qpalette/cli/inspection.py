"""qpalette inspect: what is in a model, from its headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpalette.cli.output import print_facts, print_json, print_note, print_table
from qpalette.core.errors import SpecError
from qpalette.core.records import LinearGroup
from qpalette.core.text import count, size

if TYPE_CHECKING:
    from qpalette.formats.reader import Artifact
    from qpalette.models import Grouping
    from qpalette.models.multiplied import Shares
    from qpalette.storage import Checkpoint

SHOWN_BITS = (2, 3, 4)


def inspect(
    model: Annotated[
        str, typer.Argument(help="A quantized directory, a Hugging Face directory, a .gguf file or a Hub id.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a quantized directory: compare every file with its SHA256SUMS.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a model holds and what it would weigh at 2, 3 and 4 bits. Reads headers only.

    Example: [bold]qpalette inspect SmolLM2-135M-Instruct.Q4_1.gguf[/]
    """
    from qpalette.evaluate import is_artifact
    from qpalette.storage import local_path

    place = local_path(model)
    if verify:
        from qpalette.formats import check_checksums

        print_note(f"{model}: {check_checksums(place)} files are as they were written")
    describe = _describe_artifact if is_artifact(place) else _describe_checkpoint
    describe(model, place, as_json)


@dataclass(frozen=True)
class GroupKind:
    """Groups that differ only in their layer: the same linears of the same shapes."""

    name: str
    count: int
    linears: tuple[tuple[str, int, int], ...]  # (last part of the name, out_features, in_features)
    rotation: str  # its name, or why there is none
    weights: int  # of all of them


def group_kinds(groups: tuple[LinearGroup, ...]) -> list[GroupKind]:
    """Groups gathered by kind, in order of first appearance."""
    from qpalette.models.kinds import linear_kind

    gathered: dict[tuple[Any, ...], list[LinearGroup]] = {}
    for group in groups:
        shapes = tuple((linear.name.rpartition(".")[2], *_shape(linear)) for linear in group.linears)
        gathered.setdefault((linear_kind(group.name), shapes), []).append(group)
    return [
        GroupKind(name, len(members), shapes, _rotation(members[0].in_features), sum(g.weights for g in members))
        for (name, shapes), members in gathered.items()
    ]


def _shape(linear: Any) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _rotation(dim: int) -> str:
    from qpalette.rotate import full_rotation

    try:
        return full_rotation(dim).name
    except SpecError as error:
        return str(error)


def _describe_checkpoint(model: str, place: Path, as_json: bool) -> None:
    from qpalette.models import find_groups
    from qpalette.storage import open_checkpoint

    checkpoint = open_checkpoint(place)
    grouping = find_groups(checkpoint)
    kinds = group_kinds(grouping.groups)
    sizes = {bits: _size_at(checkpoint, grouping, bits) for bits in SHOWN_BITS} if grouping.groups else {}
    if as_json:
        print_json(_checkpoint_json(checkpoint, grouping, kinds, sizes))
        return
    weights = sum(group.weights for group in grouping.groups)
    shares = _shares(checkpoint, grouping)
    facts = {
        "model": checkpoint.describe(),
        "files": size(sum(file.stat().st_size for file in checkpoint.files)),
        "linears": f"{sum(len(g.linears) for g in grouping.groups)} in {len(grouping.groups)} groups, "
        f"{count(weights)} weights",
        "packed by default": str(shares),
        "untouched": f"{len(grouping.untouched)} tensors, {size(_untouched_bytes(checkpoint, grouping))}",
    }
    facts |= {f"at {bits} bits": f"{size(nbytes)} (codes of {bits} bits)" for bits, nbytes in sizes.items()}
    print_facts(model, facts)
    _warn(shares)
    _print_kinds(kinds)
    _print_untouched(checkpoint, grouping)


def _checkpoint_json(
    checkpoint: Checkpoint, grouping: Grouping, kinds: list[GroupKind], sizes: dict[int, int]
) -> dict[str, Any]:
    from qpalette.pipeline.report import shares_json

    return {
        "kind": "checkpoint",
        "format": checkpoint.format,
        "model_type": checkpoint.config.get("model_type"),
        "bytes": checkpoint.total_bytes,
        "file_bytes": sum(file.stat().st_size for file in checkpoint.files),
        "bytes_at_bits": sizes,
        "weights": sum(group.weights for group in grouping.groups),
        "packed_by_default": shares_json(_shares(checkpoint, grouping)),
        "group_kinds": kinds,
        "groups": grouping.groups,
        "untouched": [
            {
                "name": name,
                "shape": list(checkpoint.tensors[name].shape),
                "bytes": checkpoint.tensors[name].nbytes,
                "reason": grouping.reasons.get(name, "a vector"),
            }
            for name in grouping.untouched
        ],
    }


def _shares(checkpoint: Checkpoint, grouping: Grouping) -> Shares:
    """What would be packed, and what would not."""
    from qpalette.models.multiplied import shares_of

    packed = {linear.name: linear.weights for group in grouping.groups for linear in group.linears}
    infos = (checkpoint.tensors[name] for name in grouping.untouched)
    return shares_of(
        checkpoint.config, packed, {info.name: info.shape for info in infos if info.dtype.is_floating_point}
    )


def _warn(shares: Shares) -> None:
    if (warning := shares.warning()) is not None:
        print_note(warning)


def _size_at(checkpoint: Checkpoint, grouping: Grouping, bits: int) -> int:
    """Bytes of all tensors when every linear's codes have `bits` bits, with scales and signs."""
    from qpalette.formats import packed_bits

    linears = [linear for group in grouping.groups for linear in group.linears]
    packed = sum(packed_bits(Fraction(bits), *_shape(linear)).total for linear in linears)
    return packed // 8 + _untouched_bytes(checkpoint, grouping)


def _untouched_bytes(checkpoint: Checkpoint, grouping: Grouping) -> int:
    return sum(checkpoint.tensors[name].nbytes for name in grouping.untouched)


def _print_kinds(kinds: list[GroupKind]) -> None:
    rows = [
        (
            kind.name,
            str(kind.count),
            ", ".join(f"{name} {out} x {into}" for name, out, into in kind.linears),
            kind.rotation,
            count(kind.weights),
        )
        for kind in kinds
    ]
    if rows:
        print_table("Groups", ("group", "times", "linears (out x in)", "rotation", "weights"), rows)


def _print_untouched(checkpoint: Checkpoint, grouping: Grouping) -> None:
    """Vectors (norms, biases) are small and many: one row for all of a kind."""
    from qpalette.models.kinds import linear_kind

    times: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for name in grouping.untouched:
        key = (linear_kind(name), grouping.reasons.get(name, "a vector"))
        times[key] += 1
        nbytes[key] += checkpoint.tensors[name].nbytes
    rows = [(name, str(times[name, why]), size(nbytes[name, why]), why) for name, why in times]
    if rows:
        print_table("Untouched", ("tensor", "times", "size", "reason"), rows)


def _describe_artifact(model: str, place: Path, as_json: bool) -> None:
    from qpalette.evaluate import plan_of
    from qpalette.formats import PARTS, open_artifact
    from qpalette.pipeline.report import shares_json

    artifact = open_artifact(place)
    summary, kinds = artifact.inspect(), _artifact_kinds(artifact)
    if as_json:
        facts = {"kind": "artifact", "model_type": summary.model_type, "bits_per_weight": summary.rate}
        facts |= {"weights": summary.weights, "bits": {**summary.bits.parts, "total": summary.bits.total}}
        plan = plan_of(place)
        facts |= {} if plan is None else {"plan": {**plan.prediction, "provenance": dict(plan.provenance)}}
        facts |= {"packed": shares_json(summary.shares)}
        facts |= {"bytes": summary.tensor_bytes, "carried_bytes": summary.carried_bytes, "linears": kinds}
        print_json(facts | {"provenance": dict(summary.provenance), "files": list(summary.files)})
        return
    print_facts(
        model,
        {
            "model": f"{summary.model_type}, {summary.linears} quantized linears, {count(summary.weights)} weights",
            "bits per weight": f"{float(summary.rate):.4f} (everything counted: {summary.bits.total} bits)",
            "of which": ", ".join(
                f"{part.title} {size(summary.bits.parts[part.suffix] // 8)}"
                for part in PARTS
                if part.suffix in summary.bits.parts
            ),
            "packed": str(summary.shares),
            "untouched": f"{summary.carried_tensors} tensors, {size(summary.carried_bytes)}",
            "all tensors": f"{size(summary.tensor_bytes)} in {', '.join(summary.files)}",
            **_plan_facts(place),
            **summary.provenance,
        },
    )
    rows = [
        (k["linear"], str(k["times"]), f"{k['out_features']} x {k['in_features']}", k["spec"], k["rotation"],
         f"{k['bits_per_weight']:.4f}")
        for k in kinds
    ]  # fmt: skip
    _warn(summary.shares)
    print_table("Linears", ("linear", "times", "out x in", "spec", "rotation", "bits per weight"), rows)


def _plan_facts(place: Path) -> dict[str, str]:
    """What the plan beside the weights was for, and what it promised."""
    from qpalette.evaluate import plan_of

    plan = plan_of(place)
    if plan is None or not plan.prediction:
        return {}
    known = plan.prediction
    figures = [
        f"predicted loss {known['predicted_loss']:.4g}",
        *([f"{known['loss_over_bound']:.3f} over the bound"] if "loss_over_bound" in known else []),
        *([f"{known['loss_over_uniform']:.3f} over uniform"] if "loss_over_uniform" in known else []),
    ]
    budget = plan.provenance.get("budget", "")
    return {"planned for": str(budget), "plan": ", ".join(figures)}


def _artifact_kinds(artifact: Artifact) -> list[dict[str, Any]]:
    """Linears that differ only in their layer, with what they have in common."""
    from qpalette.formats import counted_bits
    from qpalette.models.kinds import linear_kind

    times: Counter[tuple[Any, ...]] = Counter()
    rates: dict[tuple[Any, ...], float] = {}
    for name, record in artifact.records.items():
        key = (linear_kind(name), record.out_features, record.in_features, record.spec, record.rotation)
        times[key] += 1
        rates[key] = float(counted_bits(record).rate)
    names = ("linear", "out_features", "in_features", "spec", "rotation")
    return [dict(zip(names, key, strict=True), times=times[key], bits_per_weight=rates[key]) for key in times]
