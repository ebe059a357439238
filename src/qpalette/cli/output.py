"""What commands print: tables and progress for people, JSON for programs, one line for an error."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from qpalette.core.files import write_whole
from qpalette.core.text import speed


def print_error(message: str) -> None:
    """One red line on stderr."""
    one_line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(one_line)}")


def print_note(message: str) -> None:
    """A line on stderr: never mixed with a command's output."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[dim]{escape(message)}[/]")


CACHE_HELP = (
    "Keep keys and values as codes: vq-3, vq-3/vq-2.5, white:nuq-4, a plan file, or none.  [default: as the model's "
    "directory says, or none]"
)


def print_json(value: Any) -> None:
    """`value` on stdout: dataclasses as objects, exact rates as numbers, infinities as null."""
    sys.stdout.write(_json(value))


def write_json(value: Any, file: Path) -> None:
    """What `print_json` prints, to `file`. Raises as `write_text`."""
    write_text(file, _json(value))


def write_text(file: Path, text: str) -> None:
    """The whole of `file` or nothing of it. Raises InputError as `check_folder`."""
    check_folder(file)
    write_whole(file, text)


def check_folder(file: Path) -> None:
    """Raises InputError where `file` could not be written for want of a folder, or is one: ask before long work."""
    from qpalette.core.errors import InputError

    if not file.absolute().parent.is_dir():
        raise InputError(f"{file.absolute().parent} does not exist; make it, or choose another place")
    if file.is_dir():
        raise InputError(f"{file} is a directory; name a file to write")


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


WIDE = 1000  # characters of a line in a file or a pipe


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """A table on stdout: the first column is text, columns whose cells begin with a digit are aligned right, and whole:
    a number that is cut is another number."""
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    for index, name in enumerate(columns):
        numbers = index > 0 and all(not row[index] or row[index][0] in "-+0123456789" for row in rows)
        width = max((len(row[index]) for row in rows), default=0) if numbers else None
        table.add_column(name, justify="right" if numbers else "left", no_wrap=index == 0, min_width=width)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def print_facts(title: str, facts: dict[str, str]) -> None:
    """Aligned "name  value" lines on stdout."""
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(f"[dim]{escape(name)}[/]", escape(value))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(f"[bold]{escape(title)}[/]")
    console.print(grid)


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else speed(task.speed), style="dim")


class Bar:
    """A progress bar on stderr that appears with the first step; use it in a `with` statement."""

    def __init__(self, description: str, *counters: ProgressColumn) -> None:
        columns = (TextColumn(description), BarColumn(), *counters, TextColumn("[dim]left"), TimeRemainingColumn())
        # The speed is the mean of the last hour: steps may be of very different sizes.
        self._progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600)
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """`done` of `total` units are done."""
        self._progress.update(self._started(total), completed=done)

    def skip(self, done: int, total: int) -> None:
        """The same, where the last step took no time and says nothing about the speed."""
        self._progress.reset(self._started(total), completed=done)

    def tell(self, message: str) -> None:
        """A line above the bar."""
        self._progress.console.print(f"[dim]{escape(message)}[/]", highlight=False)

    def _started(self, total: int) -> TaskID:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=total)
        return self._task


def weight_bar(description: str) -> Bar:
    """A bar whose unit is a weight, so that its remaining time is true for linears of any size."""
    return Bar(description, TextColumn("{task.percentage:>3.0f} %"), _SpeedColumn())


def step_bar(description: str) -> Bar:
    """A bar of a few equal steps."""
    return Bar(description, TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())


def token_bar(description: str) -> Bar:
    """A bar of tokens that a model writes."""
    return Bar(description, TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"), TimeElapsedColumn())


class StageBars:
    """What long work tells of its stages, as bars, one after the other, and a line for each look at held-out text. Use
    it in a `with`."""

    def __init__(self) -> None:
        self._stage: tuple[str, int] | None = None
        self._bar = Bar("")

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.__exit__(*exception)

    def progress(self, stage: str, done: int, total: int) -> None:
        if (stage, total) != self._stage:  # some stages have two parts, each with a total of its own
            self._bar.__exit__()
            self._stage = stage, total
            title, kind = STAGES[stage]
            self._bar = kind(title)
            if stage in RESUMED:
                return self._bar.skip(done, total)
        self._bar.show(done, total)

    def held_out(self, step: int, kl: float) -> None:
        self._bar.tell(f"step {step}: held-out KL {kl:.4f}")


def _share_bar(description: str) -> Bar:
    return Bar(description, TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())


STAGES: dict[str, tuple[str, Callable[[str], Bar]]] = {
    "text": ("writing text", token_bar),
    "calibrate": ("calibrating", step_bar),
    "sensitivities": ("sensitivities", step_bar),
    "cache": ("cache", step_bar),
    "quantize": ("quantizing", weight_bar),
    "original": ("original", _share_bar),
    "tuning": ("tuning", _share_bar),
}
RESUMED = ("quantize", "tuning")  # what an earlier run has done comes at once, and says nothing about the speed


def quiet_transformers() -> None:
    """No progress bars and advice from transformers between a command's own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
