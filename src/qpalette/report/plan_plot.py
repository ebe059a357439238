"""The pictures of `qpalette plan`: bits per layer and kind of linear, and the Pareto front with the bound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpalette.report.pictures import check_picture, new_figure
from qpalette.report.plan_facts import place_of, uniform_front

if TYPE_CHECKING:
    from qpalette.pipeline.planning import BudgetPlan

PLAN, FRONT, UNIFORM, BOUND = "#c2410c", "#0b62a4", "#8a8a8a", "#111111"


def draw_plan(found: BudgetPlan, file: Path, points: int) -> None:
    """Both pictures, one above the other, into a .png, .svg or .pdf `file`.

    Raises InputError when matplotlib is not installed or `file` cannot be written.
    """
    check_picture(file)
    figure = new_figure(10, 8)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    _draw_bits(above, found)
    _draw_front(below.subplots(), found, points)
    figure.savefig(file, dpi=160)


def bits_by_layer(found: BudgetPlan) -> tuple[list[str], list[int], dict[tuple[str, int], float]]:
    """(kinds, layers, code bits per weight by both); of experts the mean. What is in no layer has layer -1."""
    palette = {candidate.spec: float(candidate.rate) for candidate in found.planner.space.palette}
    bits: dict[tuple[str, int], list[float]] = {}
    for linear in found.planner.sensitivities.linears:
        kind, layer = place_of(linear.name)
        cell = bits.setdefault((kind, -1 if layer is None else layer), [])
        cell.append(palette[found.plan.specs[linear.name]])
    kinds = list(dict.fromkeys(kind for kind, _ in bits))
    layers = sorted({layer for _, layer in bits})
    return kinds, layers, {key: sum(values) / len(values) for key, values in bits.items()}


def _draw_bits(figure: Any, found: BudgetPlan) -> None:
    import numpy as np

    kinds, layers, bits = bits_by_layer(found)
    grid = np.array([[bits.get((kind, layer), np.nan) for layer in layers] for kind in kinds])
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(layers) // 16)
    shown = range(0, len(layers), step)
    axes.set_xticks(shown, ["none" if layers[i] < 0 else str(layers[i]) for i in shown])
    axes.set_xlabel("layer")
    axes.set_title(
        f"Bits per weight of the codes, {float(found.planned.average_bits):.3f} on average, all counted",
        loc="left",
        fontsize=11,
    )
    axes.spines[:].set_visible(False)
    if grid.size <= 320:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if value == value:
                color = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=5.5, color=color)
    figure.colorbar(image, ax=axes, label="bits", pad=0.01)


def _draw_front(axes: Any, found: BudgetPlan, points: int) -> None:
    planner, planned = found.planner, found.planned
    front = planner.front(points)
    xs = [point.bits_per_weight for point in front]
    axes.semilogy(
        xs,
        [found.scale(point.loss) * point.bound for point in front],
        color=BOUND,
        lw=1.2,
        label="bound: reverse water-filling",
    )
    axes.semilogy(
        xs, [found.scale(point.loss) * point.loss for point in front], "-", color=FRONT, lw=1.6, label="best plans"
    )
    uniform = [
        (choice.bits / planner.weights, found.scale(choice.loss) * choice.loss) for choice in uniform_front(found)
    ]
    axes.semilogy(*zip(*uniform, strict=True), "--", color=UNIFORM, lw=1.2, label="uniform plans")
    here = float(planned.average_bits)
    axes.semilogy([here], [planned.choice.loss], "o", ms=8, color=PLAN, label="this plan", zorder=5)
    over = (
        ""
        if planned.loss_over_uniform is None
        else f"\n{planned.loss_over_uniform:.3f} of the best uniform plan's loss"
    )
    axes.annotate(
        f"{here:.3f} bits, {planned.loss_over_bound:.3f} times the bound{over}",
        (here, planned.choice.loss),
        xytext=(-10, -42),
        textcoords="offset points",
        ha="right",
        color=PLAN,
    )
    axes.set_xlabel("bits per weight, everything counted")
    axes.set_ylabel("predicted loss")
    axes.set_title("Least predicted loss for its bits", loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
