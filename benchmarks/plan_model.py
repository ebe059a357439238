"""A plan against uniform quantization on a real model: sensitivities by both methods, predicted and measured KL.

python benchmarks/plan_model.py MODEL --text TEST --calibration TRAIN [--device cuda] [--bits 2.5 --bits 3 ...]
                                [--calibrated-bits 3.25 ...] [--windows 16] [--effort standard] [--solver exact]

Data-free at each of `--bits`: the best uniform quantizer within the budget, and the plan. With LDLQ at each of
`--calibrated-bits`: the same, and the plan that knows what feedback gains. The sensitivities are kept in `--work`, so
that a rerun is quick.
"""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from report import device_name, report
from sensitivity import measured

import qpalette
from qpalette.checkpoint import open_checkpoint
from qpalette.evaluate import bits_per_weight, evaluate_models, load_model, token_windows
from qpalette.pipeline.hessians import HessianStore
from qpalette.pipeline.planning import make_plan
from qpalette.plan import Budget, Plan, Space, palette_of

Facts = dict[str, Any]


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
    work: Path = Path("out/plan_model"),
    name: str = "plan_model",
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    tokens = {"fisher": fisher_tokens, "perturbation": perturbation_tokens}
    methods = method or ["fisher"]
    sensitivities = {m: measured(m, model, calibration, tokens[m], window, device, work) for m in methods}
    print("sensitivities: done", flush=True)
    reference, tokenizer = load_model(model, device)
    chosen = token_windows(text, tokenizer, window, windows)
    hessians = work / "hessians"
    if calibrated_bits:
        start = time.perf_counter()
        qpalette.calibrate(model, hessians, calibration, tokens=calibration_tokens, window=window, device=device)
        print(f"Hessians: {time.perf_counter() - start:.0f} s", flush=True)
    checkpoint, space = open_checkpoint(model), Space(palette_of(effort))
    rows: list[dict[str, Any]] = []

    def run(plan: Plan, label: str, budget: str, calibrated: bool, facts: dict[str, Any]) -> None:
        out = work / f"{label}-{budget}{'-ldlq' if calibrated else ''}-{effort}"
        start = time.perf_counter()
        qpalette.quantize(
            model, out, plan=plan, hessians=hessians if calibrated else None, device=device, overwrite=True
        )
        seconds = time.perf_counter() - start
        found = evaluate_models(load_model(out, device)[0], reference, chosen)
        rounding = "LDLQ" if calibrated else "data-free"
        alike = [row for row in rows if (row["budget"], row["rounding"], row["plan"]) == (budget, rounding, "uniform")]
        uniform = alike[0]["KL"] if alike else None
        rows.append(
            {
                "budget": budget,
                "plan": label,
                "rounding": rounding,
                "bits": bits_per_weight(out),
                "predicted KL": facts["predicted"],
                "KL": found.kl,
                "KL stderr": found.kl_stderr,
                "below uniform": "" if uniform is None else f"{100 * (1 - found.kl / uniform):.1f} %",
                "top-1": found.top1,
                "perplexity": found.perplexity,
                "over bound": facts["over_bound"],
                "quantize s": round(seconds, 1),
            }
        )
        texts = {"text": text.name, "calibration": calibration.name, "windows": len(chosen), "window": window}
        report(name, device_name(device), rows, model=Path(model).name, effort=effort, **texts)

    def planned(
        method: str, budget: str, calibrated: bool = False
    ) -> tuple[Plan, Plan, dict[str, Any], dict[str, Any]]:
        store = HessianStore.open(hessians) if calibrated else None
        options = {"solver": solver, "hessians": store, "device": device}
        found = make_plan(sensitivities[method], Budget(Fraction(budget)), space, checkpoint, **options)
        uniform = found.planned.uniform
        assert uniform is not None
        facts = {"predicted": found.planned.choice.loss, "over_bound": found.planned.loss_over_bound}
        even_facts = {"predicted": uniform.loss, "over_bound": uniform.loss / found.planned.bound}
        return found.plan, Plan(uniform.specs), facts, even_facts

    for budget in bits or []:
        for m in methods:
            plan, even, facts, even_facts = planned(m, budget)
            if m == methods[0]:
                run(even, "uniform", budget, False, even_facts)
            run(plan, f"planned, {m}", budget, False, facts)
    for budget in calibrated_bits or []:
        for m in methods:
            plan, even, facts, even_facts = planned(m, budget, calibrated=True)
            if m == methods[0]:
                run(even, "uniform", budget, True, even_facts)
                run(planned(m, budget)[0], f"planned as data-free, {m}", budget, True, {**facts, "predicted": ""})
            run(plan, f"planned, {m}", budget, True, facts)


if __name__ == "__main__":
    typer.run(main)
