"""Fixed signs against the best of N seeds, calibrated, in one run: error of the weights and of the outputs, KL, time.

    python benchmarks/learned_signs.py MODEL HESSIANS --text FILE [--spec tcq-2-L12 ...] [--seeds 8] [--every 1]

Beside them the bound: with the best of all orthogonal transforms (the geometric mean decomposition of Jiang, Hager and
Li, 2005) the error of the outputs would be that of equal blocks, K det(H)^(1/K). No fast transform reaches it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import device_name, report

from qpalette.calibration import HessianStore
from qpalette.calibration.feedback import DAMPING, factorize
from qpalette.calibration.learned_signs import learn_seeds, predicted_loss
from qpalette.core.records import LinearGroup
from qpalette.evaluate import evaluate_models, load_model, token_windows
from qpalette.models import find_groups
from qpalette.pipeline import quantize_checkpoint
from qpalette.plan import uniform_plan
from qpalette.rotate import rotation_for
from qpalette.storage import open_checkpoint


def groups_of(model: str, every: int) -> list[LinearGroup]:
    """Those of every `every`-th layer; the others stay in 16 bits."""
    found = find_groups(open_checkpoint(model)).groups
    return [group for group in found if int(group.name.partition("layers.")[2].partition(".")[0]) % every == 0]


def predictions(groups: list[LinearGroup], hessians: Path, seeds: int, device: str) -> dict[str, Any]:
    """Mean over groups of the predicted loss of the outputs, over that of fixed signs: the best seed, the bound."""
    store, best, bound, seconds = HessianStore.open(hessians), [], [], 0.0
    for group in groups:
        rotation = rotation_for(group.in_features, "full")
        start = time.perf_counter()
        chosen = learn_seeds([(group, rotation)], store, 0, seeds, DAMPING, torch.device(device))[group.name]
        seconds += time.perf_counter() - start
        damped = factorize(store.read(group).to(device), DAMPING, group.name).hessian.double()
        fixed = predicted_loss(damped, rotation, 0, group.name)
        best.append(predicted_loss(damped, rotation, chosen, group.name) / fixed)
        bound.append(float(torch.linalg.eigvalsh(damped).log().mean().exp()) / fixed)
    return {
        "predicted_ratio": sum(best) / len(best),
        "least_predicted_ratio": min(best),
        "bound_ratio": sum(bound) / len(bound),
        "seconds_to_choose": seconds,
    }


def main(
    model: str,
    hessians: Path,
    text: Annotated[Path, typer.Option()],
    spec: Annotated[list[str] | None, typer.Option()] = None,
    seeds: int = 8,
    windows: int = 16,
    length: int = 512,
    every: Annotated[int, typer.Option(help="Quantize every N-th layer alone.")] = 1,
    device: str = "cpu",
    name: str = "learned_signs",
) -> None:
    groups = groups_of(model, every)
    predicted = predictions(groups, hessians, seeds, device)
    print(predicted, flush=True)
    reference, tokenizer = load_model(model, device)
    chosen = token_windows(text, tokenizer, length, windows)
    rows = []
    for quantizer in spec or ["tcq-2-L12", "tcq-3-L12"]:
        for count in (1, seeds):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "out")
                start = time.perf_counter()
                made: Any = quantize_checkpoint(
                    open_checkpoint(model),
                    out,
                    uniform_plan(groups, quantizer),
                    hessians=HessianStore.open(hessians),
                    sign_seeds=count,
                    device=device,
                )
                seconds = time.perf_counter() - start
                measured = evaluate_models(load_model(out, device)[0], reference, chosen)
            weights = sum(linear.bits.weights for linear in made.linears)
            rows.append(
                {
                    "spec": quantizer,
                    "signs": "fixed" if count == 1 else f"best of {count}",
                    "distortion": made.distortion,
                    "of outputs": sum(linear.proxy * linear.bits.weights for linear in made.linears) / weights,
                    "KL": measured.kl,
                    "KL stderr": measured.kl_stderr,
                    "perplexity": measured.perplexity,
                    "quantize s": round(seconds, 1),
                }
            )
            tokens = HessianStore.open(hessians).calibration.tokens
            report(
                name, device_name(device), rows, model=Path(model).name, text=text.name, windows=len(chosen),
                window=length, every=every, calibration_tokens=tokens, **predicted,
            )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
