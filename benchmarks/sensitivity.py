"""Do both sensitivities rank linears alike, and is the loss linear in the distortion? Noise of growing size tells.

python benchmarks/sensitivity.py MODEL --calibration TRAIN --text TEST [--device cuda] [--windows 4] [--plot FILE.png]
python benchmarks/sensitivity.py --draw benchmarks/results/sensitivity.json --plot docs/sensitivity.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from report import RESULTS, device_name, report

from qpalette.api import measure_sensitivities
from qpalette.calibration.sensitivity import Divergence, add_noise, noise_generator, weights_of
from qpalette.evaluate import load_model, token_windows
from qpalette.plan import Sensitivities

METHODS = ("fisher", "perturbation")
DISTORTIONS = (0.0003, 0.001, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)


def main(
    model: Annotated[str | None, typer.Argument()] = None,
    text: Annotated[Path | None, typer.Option(help="What the rise is measured on.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="What sensitivities are measured on.")] = None,
    windows: int = 4,
    window: int = 2048,
    fisher_tokens: int = 32_768,
    perturbation_tokens: int = 8192,
    device: str = "cpu",
    work: Path = Path("out/plan_model"),
    name: str = "sensitivity",
    draw: Annotated[Path | None, typer.Option(help="Draw what was measured before.")] = None,
    plot: Path | None = None,
) -> None:
    if draw is None:
        if model is None or text is None or calibration is None:
            raise typer.BadParameter("give MODEL, --text and --calibration, or --draw FILE.json")
        tokens = {"fisher": fisher_tokens, "perturbation": perturbation_tokens}
        work.mkdir(parents=True, exist_ok=True)
        known = {m: measured(m, model, calibration, tokens[m], window, device, work) for m in METHODS}
        values = [np.array([linear.sensitivity for linear in known[m].of_listed.linears]) for m in METHODS]
        names = [linear.name for linear in known["fisher"].of_listed.linears]
        rows = _linearity(model, device, token_windows_of(model, text, device, window, windows), names, values)
        facts: dict[str, Any] = {
            "model": Path(model).name,
            "text": text.name,
            "rank correlation": rank_correlation(*values),
            "linears": names,
            "fisher": values[0].tolist(),
            "perturbation": values[1].tolist(),
        }
        print(f"rank correlation of {len(names)} linears: {facts['rank correlation']:.4f}")
        report(name, device_name(device), rows, **facts)
        draw = RESULTS / f"{name}.json"
    if plot is not None:
        draw_figure(json.loads(draw.read_text()), plot)


def measured(method: str, model: str, text: Path, tokens: int, window: int, device: str, work: Path) -> Sensitivities:
    """From `work`, where an earlier run left them, or measured now."""
    file = work / f"{method}.json"
    if not file.exists():
        measure_sensitivities(model, file, text, method=method, tokens=tokens, window=window, device=device)
    return Sensitivities.read(file)


def token_windows_of(model: str, text: Path, device: str, window: int, windows: int) -> tuple[Any, list[Any]]:
    loaded, tokenizer = load_model(model, device)
    return loaded, token_windows(text, tokenizer, window, windows)


def _linearity(
    model: str, device: str, loaded: tuple[Any, list[Any]], names: list[str], values: list[np.ndarray]
) -> list[dict[str, Any]]:
    """Noise of one distortion in all linears at once."""
    network, windows = loaded
    divergence = Divergence(network, windows)
    weights = {name: weight.values for name, weight in weights_of(network, names).items()}
    originals = {name: weight.clone() for name, weight in weights.items()}
    rows = []
    for distortion in DISTORTIONS:
        for name, weight in weights.items():
            weight.copy_(originals[name])
            add_noise(weight, distortion, noise_generator(1, name))
        rise = divergence.measure()
        predicted = {
            f"{method} predicts": float(v.sum()) * distortion for method, v in zip(METHODS, values, strict=True)
        }
        rows.append(
            {"distortion": distortion, "KL": rise, **predicted, "KL / fisher": rise / predicted["fisher predicts"]}
        )
    return rows


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


def draw_figure(content: dict[str, Any], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    fisher, perturbation = np.array(content["fisher"]), np.array(content["perturbation"])
    kinds = [name.rpartition(".")[2] for name in content["linears"]]
    for index, kind in enumerate(dict.fromkeys(kinds)):
        mine = np.array([k == kind for k in kinds])
        left.loglog(fisher[mine], perturbation[mine], "o", ms=4, alpha=0.8, color=f"C{index}", label=kind)
    ends = [min(fisher.min(), perturbation[perturbation > 0].min()), max(fisher.max(), perturbation.max())]
    left.loglog(ends, ends, color="#111111", lw=1)
    left.set_xlabel("diagonal Fisher, one backward pass")
    left.set_ylabel("noise into one linear")
    left.set_title(
        f"Sensitivity of each linear (rank correlation {content['rank correlation']:.3f})", loc="left", fontsize=11
    )
    left.legend(frameon=False, fontsize=8)
    rows = content["rows"]
    rise = [row["KL"] for row in rows]
    for method, marker in zip(METHODS, "os", strict=True):
        right.loglog([row[f"{method} predicts"] for row in rows], rise, marker + "-", ms=5, lw=1.2, label=method)
    right.loglog([min(rise), max(rise)], [min(rise), max(rise)], color="#111111", lw=1, label="measured = predicted")
    right.set_xlabel("predicted KL: distortion times the sum of sensitivities")
    right.set_ylabel("measured KL, nats per token")
    right.set_title(
        f"Noise of {rows[0]['distortion']:g} to {rows[-1]['distortion']:g} in all linears", loc="left", fontsize=11
    )
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
    figure.savefig(file, dpi=160)


if __name__ == "__main__":
    typer.run(main)
