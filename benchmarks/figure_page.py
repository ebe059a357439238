"""Tables of figures made from result files: what a section is, and how it becomes a page or a part of one."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report import RESULTS

MARKED = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Result = Mapping[str, Any]
Row = Mapping[str, Any]
Read = Callable[[str], Result]
Cell = str | Callable[[Row], str]  # a template of the row's values, or a function of the row


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, rows: Iterable[Row], columns: Mapping[str, Cell]) -> Table:
        """A line for each row."""
        return cls(list(columns), [[_cell(cell, row) for cell in columns.values()] for row in rows])

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    files: Sequence[str]  # of benchmarks/results, without .json
    command: str  # that made them; several lines
    make: Callable[..., Table]

    def table(self, read: Read) -> Table:
        return self.make(*map(read, self.files))

    def markdown(self, read: Read) -> str:
        command = "".join(f"    {line}\n" for line in self.command.splitlines())
        files = ";\n".join(f"[{name}](../benchmarks/results/{name}.json){_when(read(name))}" for name in self.files)
        return f"## {self.title}\n\n{self.text}\n\n{self.table(read).markdown()}\n{command}\n{files}.\n"


SECTIONS: dict[str, Section] = {}


def section(
    title: str, *files: str, command: str, name: str | None = None, pending: bool = False
) -> Callable[[Callable[..., Table]], Callable[..., Table]]:
    """A section of the page, where it stands, by the name of its function, whose docstring is above the table. One that
    is `pending` begins with its files: nobody has measured it yet."""

    def register(make: Callable[..., Table]) -> Callable[..., Table]:
        if not pending or all((RESULTS / f"{file}.json").exists() for file in files):
            SECTIONS[name or make.__name__] = Section(title, inspect.getdoc(make) or "", files, command, make)
        return make

    return register


def read_result(name: str) -> Result:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def page(introduction: str, read: Read = read_result) -> str:
    return "\n".join([introduction, *(each.markdown(read) for each in SECTIONS.values())])


def filled(text: str, read: Read = read_result) -> str:
    """`text` with the tables that it names: `<!-- figures: SECTION -->` ... `<!-- end -->`."""
    return MARKED.sub(lambda match: match[1] + SECTIONS[match[2]].table(read).markdown() + match[3], text)


def row_of(rows: Iterable[Row], **wanted: Any) -> Row:
    """The one row with these values. Raises ValueError where there is none, or more than one."""
    (found,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return found


def _cell(cell: Cell, row: Row) -> str:
    return cell.format_map(row) if isinstance(cell, str) else cell(row)


def _when(result: Result) -> str:
    facts = [str(result[key]) for key in ("device", "date") if key in result]
    return f" ({', '.join(facts)})" if facts else ""
