"""Figures in README.md and docs/figures.md come from the files in benchmarks/results/, and from nowhere else."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import figure_page  # noqa: E402
import figures  # noqa: E402
import figures_quality  # noqa: E402

BESIDE_THE_TABLES = re.compile(
    r"<!-- figures: .*?<!-- end -->|```.*?```|`[^`]*`|^    .*?$|\]\([^)]*\)", re.DOTALL | re.MULTILINE
)
FIGURE = re.compile(r"(?<![\w.-])\d+\.\d+(?![\w.])|\d ?%|\b\d[\d.,]* ?(?:tokens/s|ms|s|x|times|GB|MB)\b")
NAMED = ("Python 3.11", "compute capability 8.0")
ITSELF = {"1.00", "0"}  # what a ratio is over; a part that there is not


def prose(text: str) -> str:
    for name in NAMED:
        text = text.replace(name, "")
    return BESIDE_THE_TABLES.sub("", text)


def test_the_page_is_what_the_results_make():
    assert figures.PAGE.read_text(encoding="utf-8") == figure_page.page(figures.INTRODUCTION)


def test_tables_in_the_readme_are_what_the_results_make():
    text = figures.README.read_text(encoding="utf-8")
    assert text == figure_page.filled(text)
    assert figure_page.MARKED.search(text)


def test_the_readme_has_no_figure_beside_its_tables():
    assert FIGURE.findall(prose(figures.README.read_text(encoding="utf-8"))) == []


def test_the_readme_is_short():
    assert len(figures.README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("typed", ["a KL of 0.03", "300 tokens/s", "6 to 14 % above", "| 3 | 0.19 |", "in 292 s"])
def test_a_figure_in_prose_is_seen(typed):
    assert FIGURE.search(prose(f"| table | figures |\n{typed}\nPython 3.11 and `--bits 3.25` are none"))


def other(value, generator):
    """The same result with another measurement: names, counts and sizes that are asked for stay."""
    if isinstance(value, dict):
        return {key: other(each, generator) for key, each in value.items()}
    if isinstance(value, list):
        return [other(each, generator) for each in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, int) and value < 2000):
        return value
    return value * generator.uniform(2, 3)


def strings(value):
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(each)


@pytest.mark.parametrize("name", figure_page.SECTIONS)
def test_every_figure_of_a_table_is_read(name):
    """Where each measurement is another one, each cell with a figure is: none was typed."""
    generator = random.Random(0)
    known = {file: figure_page.read_result(file) for file in figure_page.SECTIONS[name].files}
    measured = {file: other(result, generator) for file, result in known.items()}
    if "palette_published" in measured:  # its rows are found by their bits
        for row, true in zip(measured["palette_published"]["rows"], known["palette_published"]["rows"], strict=True):
            row["bits"] = true["bits"]
    texts = {text for result in known.values() for text in strings(result)}
    before = figure_page.SECTIONS[name].table(known.__getitem__)
    after = figure_page.SECTIONS[name].table(measured.__getitem__)
    assert before.columns == after.columns
    for old, new in zip(before.rows, after.rows, strict=True):
        assert len(old) == len(before.columns)
        for cell, again in zip(old[1:], new[1:], strict=True):
            assert cell != again or not re.search(r"\d", cell) or cell in texts or set(cell.split(" / ")) <= ITSELF


def test_results_of_compare_make_a_table():
    rows = [
        {"model": "a/original.gguf", "file_bytes": 2_000_000, "bits_per_weight": 16.0, "perplexity": 20.0},
        {"model": "b/ours", "file_bytes": 500_000, "bits_per_weight": 4.0, "kl": 0.0312, "perplexity": 21.5},
    ]
    for row in rows:
        row |= {"kl": row.get("kl"), "kl_median": row.get("kl"), "top1": 0.9 if "kl" in row else None}
    table = figures_quality.compared({"models": rows}).markdown()
    assert "| ours | 0.5 | 4.000 | 0.0312 | 0.0312 | 90.0 | 21.50 |" in table
