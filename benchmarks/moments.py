"""Which weights of tokens and which dampings calibrated rounding does best with: KL of a model rounded in memory.

python benchmarks/moments.py MODEL --text TEST --calibration TRAIN --device cuda
                             [--rate 2 --rate 3 ...] [--seed 0 --seed 1 ...] [--tokens 131072] [--windows 16]

Each row changes one thing against the first of its rate: both sides, weights clipped, equalized, the default dampings.
KL moves by 1 to 3 % from seed to seed (of the rotations' signs): a choice needs several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import device_name, report
from torch import Tensor

from qpalette.calibration import sums
from qpalette.calibration.collect import Reader
from qpalette.calibration.equalize import equalize
from qpalette.calibration.feedback import encode_with_feedback, fit_row_scales
from qpalette.calibration.hessians import input_names
from qpalette.calibration.rounding import ROUNDING, Prepared, Rounding, input_diagonal, prepare
from qpalette.calibration.taps import Weight, weights_of
from qpalette.codes import parse_spec
from qpalette.core.records import LinearGroup
from qpalette.evaluate import evaluate_models, load_model, token_windows
from qpalette.models import find_groups
from qpalette.pipeline.encode import encode_tiles
from qpalette.rotate import random_signs, rotation_for
from qpalette.runtime import select
from qpalette.storage import open_checkpoint

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped": sums.clipped,
    "as they are": lambda weights: weights,
    "square root": lambda weights: weights.sqrt(),
    "all alike": torch.ones_like,
}
Moments = dict[str, tuple[Tensor, list[Tensor]]]  # H_I and the blocks of H_O of each linear


def main(
    model: str,
    text: Annotated[Path, typer.Option(help="What KL is measured on.")],
    calibration: Annotated[Path, typer.Option(help="What moments are summed over.")],
    rate: Annotated[list[str] | None, typer.Option(help="Of tcq.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the rotations' signs.")] = None,
    tokens: int = 131_072,
    window: int = 2048,
    windows: int = 16,
    effort: str = "standard",
    device: str = "cpu",
    name: str = "moments",
) -> None:
    original, tokenizer = load_model(model, device)
    rounded = load_model(model, device)[0]
    tests = token_windows(text, tokenizer, window, windows)
    read = token_windows(calibration, tokenizer, window, tokens // window)
    groups = find_groups(open_checkpoint(model)).groups
    moments = {kind: summed(original, groups, read, function) for kind, function in WEIGHTS.items()}
    rows: list[dict[str, Any]] = []
    for chosen in rate or ["2", "3", "4"]:
        spec = parse_spec(f"tcq-{chosen}").with_effort(effort).name
        for number in seed or [0]:
            for what, (kind, two_sided, rounding) in variants().items():
                round_model(rounded, original, groups, spec, moments[kind], two_sided, rounding, number)
                found = evaluate_models(rounded, original, tests)
                row = {"spec": spec, "seed": number, "rounding": what, "KL": found.kl, "KL stderr": found.kl_stderr}
                rows.append(row | {"perplexity": found.perplexity})
                facts = {"model": Path(model).name, "text": text.name, "windows": len(tests), "window": window}
                report(name, device_name(device), rows, **facts, calibration=calibration.name, tokens=tokens)


def variants() -> dict[str, tuple[str, bool, Rounding]]:
    """Name -> weights of the tokens, whether both sides are used, how it is rounded."""
    best = ROUNDING
    return {
        "both sides, defaults": ("clipped", True, best),
        "inputs alone": ("clipped", False, best),
        "inputs alone, all tokens alike": ("all alike", False, best),
        "columns not equalized": ("clipped", True, replace(best, equalize=False)),
        **{f"weights {kind}": (kind, True, best) for kind in WEIGHTS if kind != "clipped"},
        **{f"damping {d:g}": ("clipped", True, replace(best, damping=d)) for d in (0.01, 0.1)},
        **{f"output damping {d:g}": ("clipped", True, replace(best, output_damping=d)) for d in (0.01, 0.1, 1.0)},
    }


def summed(model: Any, groups: list[LinearGroup], windows: list[Tensor], weigh: Callable[[Tensor], Tensor]) -> Moments:
    """As `calibrate` sums them, with other weights of the tokens; all at once, in memory."""
    before, sums.clipped = sums.clipped, weigh
    try:
        weights = {g.name: weights_of(model, [linear.name for linear in g.linears]) for g in groups}
        totals = [sums.GroupSums(g, weights[g.name], two_sided=True) for g in groups]
        reader = Reader(model, totals, {name: weight for each in weights.values() for name, weight in each.items()})
        for number, window in enumerate(windows):
            reader.both_sides(window, number)
    finally:
        sums.clipped = before
    return {
        linear.name: (total.inputs[key].float(), [block.float() for block in total.outputs[linear.name]])
        for total in totals
        for linear in total.group.linears
        for key in [input_names(total.group, two_sided=True)[linear.name]]
    }


@torch.no_grad()
def round_model(
    rounded: Any,
    original: Any,
    groups: list[LinearGroup],
    spec: str,
    moments: Moments,
    two_sided: bool,
    rounding: Rounding,
    seed: int,
) -> None:
    """All linears of `rounded` become what `quantize` would store of `original`'s."""
    names = [linear.name for group in groups for linear in group.linears]
    sources, targets = weights_of(original, names), weights_of(rounded, names)
    shapes: dict[tuple[int, ...], list[Prepared]] = {}
    for group in groups:
        rotation = rotation_for(group.in_features, "full")
        signs = random_signs(rotation.dim, seed, group.name).to(original.device)
        weights = [sources[linear.name].values for linear in group.linears]
        diagonal = input_diagonal(equalize(weights) if rounding.equalize else None, signs)
        for linear, weight in zip(group.linears, weights, strict=True):
            inputs, outputs = moments[linear.name]
            given = outputs if two_sided else []
            member = prepare(linear.name, weight, rotation, diagonal, inputs, given, rounding)
            shapes.setdefault(tuple(weight.shape), []).append(member)
    for members in shapes.values():
        round_together(members, spec, targets)


def round_together(members: list[Prepared], spec: str, targets: dict[str, Weight]) -> None:
    backend = select("encode", spec, members[0].unit.device)
    lefts = [left for member in members if (left := member.left) is not None]
    _, decoded = encode_with_feedback(
        torch.stack([member.unit for member in members]),
        torch.stack([member.inputs.upper for member in members]),
        partial(encode_tiles, backend, spec),
        partial(backend.decode, spec),
        torch.stack(lefts) if lefts else None,
    )
    for member, values in zip(members, decoded, strict=True):
        gains = fit_row_scales(member.unit, values, member.inputs.hessian, [side.hessian for side in member.outputs])
        scales = (gains * member.rms).half().double()
        unit = torch.where(member.rms > 0, scales / member.rms, 0.0).float() * values
        targets[member.name].values.copy_(member.restore(unit))


if __name__ == "__main__":
    typer.run(main)
