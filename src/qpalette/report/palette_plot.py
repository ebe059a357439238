"""The picture of `qpalette palette --plot`: distortion against rate, and the gap to Shannon's bound."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qpalette.core.errors import InputError
from qpalette.report.pictures import check_picture, new_figure
from qpalette.theory import distortion_bound, gap

COLUMNS = ("family", "bits", "composition", "distortion")
COLORS = ("#0b62a4", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0f766e")
PUBLISHED_MARKERS = {"tcq": "o", "vq": "s", "nuq": "^"}
GRAY, BOUND = "#8a8a8a", "#111111"


class Published(NamedTuple):
    """One figure of somebody else's quantizer."""

    family: str
    rate: float
    composition: str  # "whole": one code; "halves": half the matrix at each of two rates
    distortion: float


class Series(NamedTuple):
    """One line of the picture: the members of a family, by rising rate."""

    label: str
    rates: list[float]
    distortions: list[float]

    @property
    def gaps(self) -> list[float]:
        return [gap(d, r) for r, d in zip(self.rates, self.distortions, strict=True)]


def read_published(file: Path) -> list[Published]:
    """Rows of a CSV file with the columns family, bits, composition, distortion. Raises InputError naming the line."""
    from qpalette.evaluate.windows import read_text

    reader = csv.DictReader(read_text(file).splitlines())
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise InputError(f"{file} has no column {', '.join(missing)}; it needs {','.join(COLUMNS)}")
    rows = []
    for row in reader:
        try:
            point = Published(row["family"], float(row["bits"]), row["composition"], float(row["distortion"]))
            gap(point.distortion, point.rate)
        except (TypeError, ValueError) as error:
            raise InputError(f"{file}, line {reader.line_num}: {error}") from error
        rows.append(point)
    return rows


def draw_palette(rows: Sequence[dict[str, Any]], file: Path, published: Sequence[Published] = ()) -> None:
    """Write the picture of `rows`, measured where they are and claimed otherwise, to a .png, .svg or .pdf `file`.

    Raises InputError when matplotlib is not installed or `file` cannot be written.
    """
    check_picture(file)
    figure = new_figure(10, 4.4)
    left, right = figure.subplots(1, 2)
    series = _series(rows)
    _draw_distortion(left, series, published)
    _draw_gap(right, series, published)
    what = "measured" if rows[0].get("distortion") is not None else "claimed"
    left.set_title(f"Distortion on a Gaussian source, {what}", loc="left", fontsize=11)
    right.set_title("The same over Shannon's bound", loc="left", fontsize=11)
    figure.savefig(file, dpi=160)


def _series(rows: Sequence[dict[str, Any]]) -> list[Series]:
    """Rows by family and by what follows the rate in the spec ("tcq", "tcq L18")."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        family, _, parameters = row["spec"].partition("-")
        label = " ".join([family, *parameters.split("-")[1:]])
        distortion = row["distortion"] if row.get("distortion") is not None else row["claimed_distortion"]
        found.setdefault(label, []).append((row["rate"], distortion))
    return [Series(label, *map(list, zip(*sorted(points), strict=True))) for label, points in found.items()]


def _draw_distortion(axes: Any, series: Sequence[Series], published: Sequence[Published]) -> None:
    rates = [rate for line in series for rate in line.rates] + [point.rate for point in published]
    ends = [min(rates) - 0.2, max(rates) + 0.2]
    axes.semilogy(ends, [distortion_bound(max(0.0, rate)) for rate in ends], color=BOUND, lw=1.2, zorder=1)
    middle = sum(ends) / 2
    axes.annotate(
        "Shannon's bound $2^{-2R}$",
        (middle, distortion_bound(middle)),
        xytext=(-8, -10),
        textcoords="offset points",
        ha="right",
        va="top",
        color=BOUND,
    )
    for color, line in zip(_colors(series), series, strict=True):
        axes.plot(line.rates, line.distortions, "o", ms=4.5, color=color, zorder=3, label=line.label)
    _scatter_published(axes, published, [point.distortion for point in published])
    axes.set_ylabel("mean squared error / mean square")
    axes.legend(frameon=False, loc="upper right", handletextpad=0.2)
    _tidy(axes)


def _draw_gap(axes: Any, series: Sequence[Series], published: Sequence[Published]) -> None:
    axes.axhline(1.0, color=BOUND, lw=1.2, zorder=1)
    _scatter_published(axes, published, [gap(point.distortion, point.rate) for point in published])
    for color, line in zip(_colors(series), series, strict=True):
        axes.plot(line.rates, line.gaps, "o-", ms=4.5, lw=1.6, color=color, zorder=3)
        axes.annotate(
            line.label,
            (line.rates[-1], line.gaps[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
        )
    _label_published(axes, series, published)
    highest = axes.get_ylim()[1]
    axes.set_ylim(1 - 0.09 * (highest - 1), highest)
    axes.margins(x=0.12)
    axes.annotate(
        "Shannon's bound", (1, 1.0), xycoords=("axes fraction", "data"), xytext=(-4, -4), textcoords="offset points",
        ha="right", va="top", color=BOUND,
    )  # fmt: skip
    axes.set_ylabel("gap: distortion / bound")
    _tidy(axes)


def _label_published(axes: Any, series: Sequence[Series], published: Sequence[Published]) -> None:
    """Names at the right end of each published family, except where one of our points is already named."""
    ours = [(line.rates[-1], line.gaps[-1]) for line in series]
    for family in dict.fromkeys(point.family for point in published):
        last = max((point for point in published if point.family == family), key=lambda point: point.rate)
        x, y = last.rate, gap(last.distortion, last.rate)
        if all(abs(x - a) > 0.5 or abs(y - b) > 0.1 for a, b in ours):
            axes.annotate(
                f"{family}, published", (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=GRAY
            )


def _scatter_published(axes: Any, published: Sequence[Published], heights: Sequence[float]) -> None:
    for family in dict.fromkeys(point.family for point in published):
        chosen = [(point.rate, y) for point, y in zip(published, heights, strict=True) if point.family == family]
        marker = PUBLISHED_MARKERS.get(family, "D")
        xs, ys = zip(*sorted(chosen), strict=True)
        axes.plot(xs, ys, marker, ms=5, mfc="none", mec=GRAY, zorder=2, label=f"{family}, published")


def _colors(series: Sequence[Series]) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(len(series))]


def _tidy(axes: Any) -> None:
    axes.set_xlabel("rate R (bits per weight)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(integer=True)
