"""The picture of `qpalette bench --plot`: tokens per second against the batch size, a line for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpalette.core.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from qpalette.bench import Speed

COLORS = ("#8a8a8a", "#0b62a4", "#c2410c", "#15803d")
FORMATS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Raises InputError or UnsupportedError for a picture that could not be written, before minutes of timing."""
    if file.suffix not in FORMATS:
        raise InputError(f"{file} must end in {', '.join(FORMATS)}")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file.parent} is no directory: make it first")
    _figure()


def draw_speeds(speeds: Sequence[Speed], file: Path, device: Any) -> None:
    """Write the picture: tokens per second of the whole batch, both axes logarithmic, values at the points."""
    from qpalette.cli.bench import device_name

    figure = _figure()(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for color, model in zip(COLORS, dict.fromkeys(speed.model for speed in speeds), strict=False):
        points = [speed for speed in speeds if speed.model == model]
        label = model + (" (random weights)" if points[0].random_weights else "")
        rates = [point.tokens_per_second for point in points]
        axes.plot([point.batch for point in points], rates, "o-", color=color, label=label)
        for point, rate in zip(points, rates, strict=True):
            axes.annotate(
                f"{rate:.0f}", (point.batch, rate), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
    batches = sorted({speed.batch for speed in speeds})
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="tokens per second, whole batch")
    axes.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    first = speeds[0]
    axes.set_title(f"Decoding after {first.context} tokens, {device_name(device)}, {first.runner}", fontsize=10)
    figure.savefig(file, dpi=150)


def _figure() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401 - what savefig needs
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(f'--plot needs matplotlib ({error}): pip install "qpalette[plot]"') from error
    return Figure
