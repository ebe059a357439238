"""What all pictures share: where they can be written, and the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qpalette.core.errors import InputError

FORMATS = (".png", ".svg", ".pdf")


def check_picture(file: Path) -> None:
    """Raises InputError for a picture that could not be written: ask before minutes of work."""
    if file.suffix not in FORMATS:
        raise InputError(f"{file} must end in {', '.join(FORMATS)}")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file.absolute().parent} does not exist; make it, or choose another place for the picture")
    new_figure(1, 1)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches, with a canvas of its own. Raises InputError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f'pictures need matplotlib ({error}): pip install "qpalette[plot]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
