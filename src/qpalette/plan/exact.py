"""The exact choice: what cannot be in a better solution is left out, and the rest is searched.

Whole bits alone are a knapsack for dynamic programming; with times in seconds or fused launches it is an integer
program for HiGHS, through scipy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from qpalette.core.errors import SpecError
from qpalette.plan.knapsack import MOST_CELLS, solve_knapsack, table_cells
from qpalette.plan.lagrangian import Relaxation, solve_lagrangian
from qpalette.plan.problem import Floats, Problem, Selection

SOLVERS = ("exact", "lagrangian")
GAP = 9e-5  # at which the search may stop: far below what a prediction is worth
SECONDS = 30.0  # after which it must; what was found by then is returned with its gap
TIGHTENINGS = 8
ROUNDING = 1e-9  # of sums of losses, relative


@dataclass(frozen=True)
class Solved:
    """A selection within all limits. No selection has a loss below `bound`."""

    selection: Selection
    bound: float

    @property
    def gap(self) -> float:
        """(loss - bound) / loss: 0 is proven optimal."""
        loss = self.selection.loss
        return max(0.0, (loss - self.bound) / loss) if loss > 0 else 0.0


def check_solver(solver: str) -> None:
    """Raises SpecError for another than SOLVERS."""
    if solver not in SOLVERS:
        raise SpecError(f"'{solver}' is no solver: choose {' or '.join(SOLVERS)}")


def solve(problem: Problem, solver: str = "exact") -> Solved | None:
    """The selection of least loss within the limits; None when there is none (or "lagrangian" found none).

    `solver` is "exact" (dynamic programming to a gap of 0, or HiGHS to one of 1e-4 or for 30 s) or "lagrangian"
    (bisection alone, whose gap is small with many linears). Raises SpecError for another solver.
    """
    check_solver(solver)
    if (problem.least > problem.limits).any():
        return None
    relaxation = solve_lagrangian(problem)
    best = relaxation.selection
    if best is None and solver == "lagrangian":
        return None
    if best is not None and solver == "lagrangian":
        return Solved(best, min(relaxation.bound, best.loss))
    kept = np.ones(len(problem.loss), dtype=bool)
    if best is not None:
        kept = relaxation.bound + relaxation.tightest.excess <= best.loss * (1 + ROUNDING)
    cells = table_cells(problem, kept)
    if cells is not None and cells <= MOST_CELLS:
        found = solve_knapsack(problem, kept)
        assert found is not None, "the options of the best known selection are kept"
        return Solved(found, found.loss)
    return _branch_and_bound(problem, relaxation, best, kept)


def _branch_and_bound(
    problem: Problem, relaxation: Relaxation, best: Selection | None, kept: np.ndarray
) -> Solved | None:
    """The integer program over the `kept` options, its limits tightened until they hold exactly: HiGHS takes a row for
    satisfied within 1e-6 of its size, and a hard budget is not."""
    limits, bound = problem.limits.copy(), relaxation.bound
    for attempt in range(TIGHTENINGS):
        selection, lower = _milp(problem, kept, limits)
        if attempt == 0 and best is not None:
            bound = max(bound, min(lower, best.loss))
        elif attempt == 0:
            bound = max(bound, lower)
        if selection is None:
            break
        if problem.within_limits(selection):
            if best is None or selection.loss < best.loss:
                best = selection
            break
        limits -= 2 * np.maximum(0, selection.costs - problem.limits)
    return None if best is None else Solved(best, min(bound, best.loss))


def _milp(problem: Problem, kept: np.ndarray, limits: Floats) -> tuple[Selection | None, float]:
    """The best selection among `kept` options, and a lower bound on all of those: infinite when there is none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    options = np.flatnonzero(kept)
    alive = np.bincount(problem.segment_of_option[options], minlength=len(problem.segments)) > 0
    usable = np.logical_and.reduceat(alive, problem.variant_start)
    options = options[usable[problem.variant_of_segment][problem.segment_of_option[options]]]
    if len(np.unique(problem.block_of_variant[usable])) < len(problem.blocks):
        return None, np.inf
    segments, segment_row = np.unique(problem.segment_of_option[options], return_inverse=True)
    variants, variant_column = np.unique(problem.variant_of_segment[segments], return_inverse=True)
    blocks, block_row = np.unique(problem.block_of_variant[variants], return_inverse=True)
    n, m = len(options), len(variants)
    # one option in each segment of a chosen variant, none in the others; one variant in each block
    one_option = csr_array(
        (
            np.concatenate([np.ones(n), -np.ones(len(segments))]),
            (
                np.concatenate([segment_row, np.arange(len(segments))]),
                np.concatenate([np.arange(n), n + variant_column]),
            ),
        ),
        shape=(len(segments), n + m),
    )
    one_variant = csr_array((np.ones(m), (block_row, n + np.arange(m))), shape=(len(blocks), n + m))
    resources = csr_array(
        np.concatenate([problem.costs[options].T / limits[:, None], np.zeros((len(limits), m))], axis=1)
    )
    scale = float(problem.loss[options].sum()) / n or 1.0
    with _silent_stdout():  # HiGHS 1.8 prints a line of its own, whatever its options say
        result = milp(
            np.concatenate([problem.loss[options] / scale, np.zeros(m)]),
            integrality=np.ones(n + m),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(
                vstack([one_option, one_variant, resources]).tocsc(),
                np.concatenate([np.zeros(len(segments)), np.ones(len(blocks)), np.full(len(limits), -np.inf)]),
                np.concatenate([np.zeros(len(segments)), np.ones(len(blocks)), np.ones(len(limits))]),
            ),
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
    lower = result.mip_dual_bound if result.mip_dual_bound is not None else -np.inf
    if result.x is None:
        return None, np.inf if result.status == 2 else float(lower) * scale
    return problem.selection(options[result.x[:n] > 0.5]), float(lower) * scale


@contextmanager
def _silent_stdout() -> Iterator[None]:
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
