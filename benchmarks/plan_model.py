"""A plan against uniform quantization on a real model: sensitivities by both methods, predicted and measured KL.

python benchmarks/plan_model.py MODEL --text TEST --calibration TRAIN [--device cuda] [--bits 2.5 --bits 3 ...]
                                [--calibrated-bits 3.25 ...] [--windows 16] [--effort standard] [--solver exact]
                                [--planned-only]

Data-free at each of `--bits`: the best uniform quantizer within the budget, and the plan. With LDLQ at each of
`--calibrated-bits`: the same, and the plan that knows what feedback gains. The sensitivities are kept in `--work`, so
that a rerun is quick.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from report import device_name, report
from sensitivity import measured

import qpalette
from qpalette.calibration.hessians import HessianStore
from qpalette.evaluate import bits_per_weight, evaluate_models, load_model, token_windows
from qpalette.pipeline.planning import BudgetPlan, make_plan
from qpalette.plan import Budget, Plan, Space, palette_of
from qpalette.storage import open_checkpoint


def main(
    model: str,
    text: Annotated[Path, typer.Option(help="What KL is measured on.")],
    calibration: Annotated[Path, typer.Option(help="What sensitivities and Hessians are measured on.")],
    bits: Annotated[list[str] | None, typer.Option(help="Data-free, uniform and planned.")] = None,
    calibrated_bits: Annotated[list[str] | None, typer.Option(help="LDLQ, planned.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="fisher, perturbation; of the sensitivities.")] = None,
    windows: int = 16,
    window: int = 2048,
    fisher_tokens: int = 32_768,
    perturbation_tokens: int = 8192,
    calibration_tokens: int = 131_072,
    device: str = "cpu",
    effort: str = "standard",
    solver: str = "exact",
    planned_only: Annotated[bool, typer.Option(help="Leave out what plans are compared with.")] = False,
    work: Path = Path("out/plan_model"),
    name: str = "plan_model",
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    tokens = {"fisher": fisher_tokens, "perturbation": perturbation_tokens}
    methods = method or ["fisher"]
    known = {m: measured(m, model, calibration, tokens[m], window, device, work) for m in methods}
    reference, tokenizer = load_model(model, device)
    chosen = token_windows(text, tokenizer, window, windows)
    texts = {"text": text.name, "calibration": calibration.name, "windows": len(chosen), "window": window}
    trial = Trial(model, device, effort, work, reference, chosen, name, {"effort": effort, **texts})
    checkpoint, space = open_checkpoint(model), Space(palette_of(effort))
    for budget in bits or []:
        for m in methods:
            found = make_plan(known[m], Budget(Fraction(budget)), space, checkpoint, solver=solver)
            if m == methods[0] and not planned_only:
                trial.run_uniform(found, budget)
            trial.run(found.plan, f"planned, {m}", budget, found.planned.choice.loss, found.planned.loss_over_bound)
    if not calibrated_bits:
        return
    hessians = work / "hessians"
    qpalette.calibrate(model, hessians, calibration, tokens=calibration_tokens, window=window, device=device)
    trial.hessians = hessians
    for budget in calibrated_bits:
        for m in methods:
            options: dict[str, Any] = {"solver": solver, "hessians": HessianStore.open(hessians), "device": device}
            found = make_plan(known[m], Budget(Fraction(budget)), space, checkpoint, **options)
            if m == methods[0] and not planned_only:
                free = make_plan(known[m], Budget(Fraction(budget)), space, checkpoint, solver=solver)
                trial.run_uniform(found, budget)
                trial.run(free.plan, f"planned as data-free, {m}", budget, None, free.planned.loss_over_bound)
            trial.run(found.plan, f"planned, {m}", budget, found.planned.choice.loss, found.planned.loss_over_bound)


@dataclass
class Trial:
    """Quantizes, measures, and reports a row for each plan."""

    model: str
    device: str
    effort: str
    work: Path
    reference: Any
    windows: list[Any]
    name: str
    facts: dict[str, Any]
    hessians: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run_uniform(self, found: BudgetPlan, budget: str) -> None:
        uniform = found.planned.uniform
        assert uniform is not None, f"no uniform plan has {budget} bits"
        self.run(Plan(uniform.specs), "uniform", budget, uniform.loss, uniform.loss / found.planned.bound)

    def run(self, plan: Plan, label: str, budget: str, predicted: float | None, over_bound: float) -> None:
        rounding = "data-free" if self.hessians is None else "LDLQ"
        out = self.work / f"{label}-{budget}-{rounding}-{self.effort}"
        start = time.perf_counter()
        qpalette.quantize(self.model, out, plan=plan, hessians=self.hessians, device=self.device, overwrite=True)
        seconds = time.perf_counter() - start
        found = evaluate_models(load_model(out, self.device)[0], self.reference, self.windows)
        assert found.kl is not None
        alike = [
            row for row in self.rows if (row["budget"], row["plan"], row["rounding"]) == (budget, "uniform", rounding)
        ]
        self.rows.append(
            {
                "budget": budget,
                "plan": label,
                "rounding": rounding,
                "bits": bits_per_weight(out),
                "predicted KL": "" if predicted is None else predicted,
                "KL": found.kl,
                "KL stderr": found.kl_stderr,
                "below uniform": f"{100 * (1 - found.kl / alike[0]['KL']):.1f} %" if alike else "",
                "top-1": found.top1,
                "perplexity": found.perplexity,
                "over bound": over_bound,
                "quantize s": round(seconds, 1),
            }
        )
        report(self.name, device_name(self.device), self.rows, model=Path(self.model).name, **self.facts)


if __name__ == "__main__":
    typer.run(main)
