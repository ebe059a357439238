"""The picture of `qpalette compare --plot`: what a model takes on disk against what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpalette.report.pictures import new_figure

if TYPE_CHECKING:
    from qpalette.evaluate.compare import Compared

OURS, BOUND, ORIGINAL = "#c2410c", "#111111", "#8a8a8a"
OTHERS = ("#0b62a4", "#15803d", "#7c3aed", "#b45309", "#0e7490")


def draw_comparison(rows: Sequence[Compared], file: Path) -> None:
    """`rows` are those of `compare`: the original, then the models. Those without a KL above 0 have no point."""
    original, *models = rows
    figure = new_figure(8.5, 5)
    axes = figure.subplots()
    others = iter(OTHERS * len(rows))
    for name in dict.fromkeys(row.format for row in models if _has_point(row)):
        points = [row for row in models if _has_point(row) and row.format == name]
        color = OURS if name == "qpalette" else next(others)
        axes.semilogy([_megabytes(row) for row in points], [row.kl for row in points], "o", color=color, label=name)
        for row in points:
            _name(axes, row, color)
    _draw_bound(axes, models)
    if original.file_bytes is not None:
        axes.axvline(_megabytes(original), color=ORIGINAL, lw=1, ls="--", label="original")
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("weight files, MB")
    axes.set_ylabel("KL from the original, nats per token")
    axes.margins(x=0.12, y=0.12)
    axes.grid(True, which="major", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=160)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _draw_bound(axes: Any, models: Sequence[Compared]) -> None:
    bounds = sorted((_megabytes(row), row.kl_bound) for row in models if row.kl_bound)
    if bounds:
        axes.semilogy(
            *zip(*bounds, strict=True), "_-", color=BOUND, ms=10, lw=0.8, label="bound of what the plans predict"
        )


def _name(axes: Any, row: Compared, color: str) -> None:
    name = Path(row.model).name
    axes.annotate(name, (_megabytes(row), row.kl), (5, 5), textcoords="offset points", fontsize=8, color=color)


def _has_point(row: Compared) -> bool:
    return row.file_bytes is not None and row.kl is not None and row.kl > 0


def _megabytes(row: Compared) -> float:
    assert row.file_bytes is not None, "measured"
    return row.file_bytes / 1e6
