"""The page of `qpalette plan --report`: one HTML file with pictures, table and commands, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from qpalette.core.text import count
from qpalette.report.plan_facts import facts_of, kinds_of
from qpalette.report.plan_plot import bits_png, front_png

if TYPE_CHECKING:
    from qpalette.pipeline.planning import BudgetPlan

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
table.facts td {{ text-align: left; }}
img {{ max-width: 100%; }}
pre {{ background: #f5f5f5; padding: .7rem; overflow-x: auto; }}
details table {{ font-size: 13px; }}
</style>
<h1>{title}</h1>
{facts}
<h2>Bits by layer and linear</h2>
<img alt="Heat map of bits per weight by layer and kind of linear" src="data:image/png;base64,{bits}">
<h2>What other budgets would buy</h2>
<img alt="Predicted loss against bits per weight, with the bound" src="data:image/png;base64,{front}">
<h2>By kind of linear</h2>
{kinds}
<h2>Commands</h2>
<pre>{commands}</pre>
<details><summary>Every linear</summary>
{linears}
</details>
</html>
"""


def plan_page(found: BudgetPlan, budget: str, command: str, model: str, points: int) -> str:
    """HTML. Raises InputError when matplotlib is not installed."""
    total = found.planned.choice.loss or 1.0
    kinds = [
        (
            kind["kind"],
            str(kind["linears"]),
            count(kind["weights"]),
            f"{kind['least']} .. {kind['most']}",
            f"{kind['bits_per_weight']:.4f}",
            f"{100 * kind['loss'] / total:.1f} %",
        )
        for kind in kinds_of(found)
    ]
    linears = [
        (linear.name, found.plan.specs[linear.name], f"{linear.sensitivity:.4g}")
        for linear in found.planner.sensitivities.linears
    ]
    return PAGE.format(
        title=escape(f"{model}: {budget}"),
        facts=_table((), list(facts_of(found, budget).items()), "facts"),
        bits=base64.b64encode(bits_png(found)).decode(),
        front=base64.b64encode(front_png(found, points)).decode(),
        kinds=_table(("linear", "times", "weights", "specs", "bits per weight", "of the loss"), kinds),
        commands=escape(f"{command}\nqpalette quantize {model} OUT --plan PLAN.json"),
        linears=_table(("linear", "spec", "sensitivity"), linears),
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}">\n' + (f"<tr>{head}</tr>\n" if head else "") + body + "\n</table>"
