"""Measures every trellis quantizer that no file of results has yet, on the CPU, and writes the table of claims.

    python benchmarks/palette_distortions.py [--memory 12]        # writes src/qpalette/codes/distortions.json

What plain sampling has measured on a GPU is taken up to 5 bits; above, its error grows (`evaluate/distortion.py`). At
L = 20, which no effort stands for, only whole bits and the ends of each codebook are; for the others, what L = 20 saves
over L = 18 is taken from the nearest measured rates of the same codebook, and the figure is listed as estimated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from report import RESULTS, processor, report

from qpalette.codes import FAMILIES
from qpalette.codes.distortions import DISTORTIONS
from qpalette.codes.trellis import MEMORIES, Trellis
from qpalette.evaluate.distortion import estimate_distortion
from qpalette.theory import distortion_bound

NAME = "palette_distortions_cpu"
ON_GPU, MOST_ON_GPU = ("palette_h100", "palette_best_h100"), 5  # files, bits
# Distortion over the bound at 1, 2, .. bits and L = 20, where no file has more: 2 * 10^5 to 10^6 plain samples.
WHOLE_BITS = {
    "tcq": (1.053, 1.063, 1.072, 1.088, 1.093, 1.100, 1.127, 1.155),
    "tcq2": (1.055, 1.070, 1.110, 1.177, 1.207),
}
# Relative standard error that is asked for, and log2 of the most weights, by memory.
EFFORTS = {12: (0.0025, 24), 16: (0.0025, 22), 18: (0.004, 19), 20: (0.005, 16)}


def main(memory: Annotated[list[int] | None, typer.Option(help="Trellis memory; repeatable.  [all]")] = None) -> None:
    torch.set_num_threads(1)
    file = RESULTS / f"{NAME}.json"
    rows = _rows(file) if file.exists() else []
    done = {row["spec"] for row in rows} | _on_gpu().keys()
    for length in sorted(memory or MEMORIES):
        error, most = EFFORTS[length]
        for quantizer in _members(length):
            if quantizer.name not in done and (length < MEMORIES[-1] or _is_anchor(quantizer)):
                found = estimate_distortion(quantizer, error, least=1 << min(16, most), most=1 << most)
                figures = {"distortion": found.value, "relative_error": found.relative_error, "weights": found.weights}
                rows.append({"spec": quantizer.name, **figures})
                report(NAME, processor(), rows, command="python benchmarks/palette_distortions.py")
    write_table()


def write_table() -> None:
    """Every figure, by memory, family and rate."""
    measured = _whole_bits() | {row["spec"]: row["distortion"] for row in _rows(RESULTS / f"{NAME}.json")} | _on_gpu()
    every = [quantizer for memory in MEMORIES for quantizer in _members(memory)]
    estimated = {q.name: _between(q, measured) for q in every if q.name not in measured and q.memory == MEMORIES[-1]}
    table = {
        name: {q.name: float(f"{found[q.name]:.5g}") for q in every if q.name in found}
        for name, found in (("measured", measured), ("estimated", estimated))
    }
    DISTORTIONS.write_text(json.dumps(table, indent=1) + "\n")


def _is_anchor(quantizer: Trellis) -> bool:
    """Whether it is of whole bits, or the first or last of its codebook."""
    return quantizer.rate.denominator == 1 or len(_same_codebook(quantizer, (-1, 1))) < 2


def _same_codebook(quantizer: Trellis, steps: Iterable[int]) -> list[Trellis]:
    """Members at so many eighths of a bit from `quantizer` whose codebook has as many entries."""
    found = [
        replace(quantizer, eighths=quantizer.eighths + step)
        for step in steps
        if quantizer.least_eighths <= quantizer.eighths + step <= quantizer.most_eighths
    ]
    return [other for other in found if other.table_shape == quantizer.table_shape]


def _between(quantizer: Trellis, measured: Mapping[str, float]) -> float:
    """The distortion of a shorter search, times what the longer one keeps of it at measured rates of the same codebook:
    the nearest below and above, or on one side where the other has none."""

    def kept(other: Trellis) -> float:
        return measured[other.name] / measured[replace(other, memory=MEMORIES[-2]).name]

    sides = (range(-1, -64, -1), range(1, 64))
    near = [next((q for q in _same_codebook(quantizer, side) if q.name in measured), None) for side in sides]
    known = {q.eighths: kept(q) for q in near if q is not None}
    ratio = float(np.interp(quantizer.eighths, list(known), list(known.values())))
    return ratio * measured[replace(quantizer, memory=MEMORIES[-2]).name]


def _whole_bits() -> dict[str, float]:
    found = {}
    for family, gaps in WHOLE_BITS.items():
        for bits, gap in enumerate(gaps, start=1):
            found[FAMILIES[family](8 * bits, MEMORIES[-1]).name] = gap * distortion_bound(bits)
    return found


def _on_gpu() -> dict[str, float]:
    rows = [row for name in ON_GPU for row in _rows(RESULTS / f"{name}.json") if row["rate"] <= MOST_ON_GPU]
    return {row["spec"]: row["distortion"] for row in rows}


def _members(memory: int) -> list[Trellis]:
    palette = [quantizer for family in FAMILIES.values() for quantizer in family.palette()]
    return [replace(quantizer, memory=memory) for quantizer in palette if isinstance(quantizer, Trellis)]


def _rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"]


if __name__ == "__main__":
    typer.run(main)
