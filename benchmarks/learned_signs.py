"""Fixed signs against the best of N seeds, calibrated, in one run: error of the weights and of the outputs, KL, time.

    python benchmarks/learned_signs.py MODEL HESSIANS --text FILE [--spec tcq-2-L12 ...] [--seeds 8] [--windows 16]

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

import qpalette
from qpalette.checkpoint import find_groups, open_checkpoint
from qpalette.evaluate import evaluate_models, load_model, token_windows
from qpalette.pipeline import HessianStore
from qpalette.pipeline.learned_signs import learn_seeds, predicted_loss
from qpalette.quantizers.feedback import DAMPING, factorize
from qpalette.rotate import rotation_for


def predictions(model: str, hessians: Path, seeds: int, device: str) -> dict[str, Any]:
    """Mean over groups of the predicted loss of the outputs, over that of fixed signs: the best seed, the bound."""
    store, best, bound, seconds = HessianStore.open(hessians), [], [], 0.0
    for group in find_groups(open_checkpoint(model)).groups:
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
    device: str = "cpu",
    name: str = "learned_signs",
) -> None:
    predicted = predictions(model, hessians, seeds, device)
    print(predicted)
    reference, tokenizer = load_model(model, device)
    chosen = token_windows(text, tokenizer, length, windows)
    rows = []
    for quantizer in spec or ["tcq-2-L12", "tcq-3-L12"]:
        for count in (1, seeds):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "out")
                start = time.perf_counter()
                made: Any = qpalette.quantize(
                    model, out, spec=quantizer, hessians=hessians, sign_seeds=count, device=device
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
            report(
                name, device_name(device), rows, model=Path(model).name, text=text.name, windows=len(chosen),
                window=length, calibration_tokens=HessianStore.open(hessians).calibration.tokens, **predicted,
            )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
