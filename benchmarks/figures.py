"""Every table of figures in docs/figures.md and README.md, from the files in benchmarks/results/; none is typed.

    python benchmarks/figures.py

writes docs/figures.md, and the tables that README.md names between markers. What the first column says may be typed;
all else comes from the files. `tests/unit/test_figures.py` makes all of it again.
"""

from __future__ import annotations

from pathlib import Path

# Sections stand in the order of their import.
import figures_glance  # noqa: F401  # isort: skip
import figures_quality  # noqa: F401  # isort: skip
import figures_speed  # noqa: F401  # isort: skip
import figures_prompts  # noqa: F401  # isort: skip
import figures_cpu  # noqa: F401  # isort: skip
from figure_page import filled, page

ROOT = Path(__file__).resolve().parent.parent
PAGE, README = ROOT / "docs" / "figures.md", ROOT / "README.md"
INTRODUCTION = """# Figures

Made by `python benchmarks/figures.py` from the files named under each table, which have the machine, the date and all
digits; the command above them is the one that measured them. What one page of `docs/` is about has its figures there.
"""

if __name__ == "__main__":
    PAGE.write_text(page(INTRODUCTION), encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
