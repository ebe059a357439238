"""The picture of `qpalette bench --plot`: tokens per second, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpalette.report.pictures import new_figure

if TYPE_CHECKING:
    from qpalette.bench import Share, Speed

COLORS = ("#8a8a8a", "#0b62a4", "#c2410c", "#15803d")
PART_COLORS = ("#0b62a4", "#c2410c", "#7aa6cf", "#15803d", "#eab308", "#8a8a8a", "#d4d4d4")


def draw_speeds(speeds: Sequence[Speed], shares: Mapping[str, Sequence[Share]], file: Path, device: str) -> None:
    """Write the picture: tokens per second of the whole batch against the batch size, or a bar for each model where one
    was timed; beside it where a step's time goes, when `shares` (by model) say so."""
    several = len({speed.batch for speed in speeds}) > 1
    figure = new_figure(12.5 if shares else 7.5, 4.6)
    panels = figure.subplots(1, 2 if shares else 1, squeeze=False)[0]
    (_draw_lines if several else _draw_bars)(panels[0], speeds)
    if shares:
        _draw_shares(panels[1], shares)
    first = speeds[0]
    figure.suptitle(f"Decoding after {first.context} tokens, {device}, {first.runner}", fontsize=10)
    figure.savefig(file, dpi=150)


def _draw_lines(axes: Any, speeds: Sequence[Speed]) -> None:
    for color, model in zip(COLORS, dict.fromkeys(speed.model for speed in speeds), strict=False):
        points = [speed for speed in speeds if speed.model == model]
        rates = [point.tokens_per_second for point in points]
        axes.plot([point.batch for point in points], rates, "o-", color=color, label=_label(points[0]))
        for point, rate in zip(points, rates, strict=True):
            axes.annotate(
                f"{rate:.0f}", (point.batch, rate), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
    batches = sorted({speed.batch for speed in speeds})
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="tokens per second, whole batch")
    axes.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axes.minorticks_off()
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_bars(axes: Any, speeds: Sequence[Speed]) -> None:
    rates = [speed.tokens_per_second for speed in speeds]
    bars = axes.barh([_label(speed) for speed in speeds], rates, color=COLORS[1])
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set(xlabel=f"tokens per second, batch size {speeds[0].batch}")


def _label(speed: Speed) -> str:
    return speed.model + (" (random weights)" if speed.random_weights else "")


def _draw_shares(axes: Any, shares: Mapping[str, Sequence[Share]]) -> None:
    models = list(shares)
    begins = [0.0] * len(models)
    parts = dict.fromkeys(share.part for of_model in shares.values() for share in of_model)
    for color, part in zip(PART_COLORS, parts, strict=False):
        times = [sum(1e6 * share.seconds for share in shares[model] if share.part == part) for model in models]
        axes.barh(models, times, left=begins, color=color, label=part)
        begins = [begin + time for begin, time in zip(begins, times, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="where a step's time goes, microseconds")
    axes.legend(frameon=False, fontsize=8, ncols=2)
