"""KL and perplexity of a model quantized at several rates (or specs, or rotations), everything counted.

python benchmarks/rates.py MODEL --text FILE [--windows 16] [--spec tcq-2 --spec tcq-3 ...] [--rotation full ...]
                           [--hessians DIR] [--device cuda] [--name rates]

With `--hessians` (from `qpalette calibrate`) each spec is quantized twice, data-free and calibrated.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from report import device_name, report

import qpalette
from qpalette.evaluate import bits_per_weight, evaluate_models, load_model, token_windows


def main(
    model: str,
    text: Annotated[Path, typer.Option()],
    windows: int = 16,
    hessians: Annotated[Path | None, typer.Option()] = None,
    device: str = "cpu",
    spec: Annotated[list[str] | None, typer.Option()] = None,
    rotation: Annotated[list[str] | None, typer.Option()] = None,
    work: Annotated[Path, typer.Option(help="Where the models go; kept, so that a rerun is quick.")] = Path("out"),
    name: str = "rates",
) -> None:
    reference, tokenizer = load_model(model, device)
    chosen = token_windows(text, tokenizer, 2048, windows)
    rows = []
    for quantizer, kind, calibration in product(
        spec or ["tcq-2", "tcq-3", "tcq-3.25", "tcq-4", "tcq-5"],
        rotation or ["full"],
        [None] if hessians is None else [None, hessians],
    ):
        rounding = "data-free" if calibration is None else "calibrated"
        out = work / f"{Path(model).stem}-{quantizer}-{kind}-{rounding}"
        start = time.perf_counter()
        made = not out.exists()
        if made:
            qpalette.quantize(model, out, spec=quantizer, rotation=kind, hessians=calibration, device=device)
        seconds = time.perf_counter() - start
        measured = evaluate_models(load_model(out, device)[0], reference, chosen)
        rows.append(
            {
                "spec": quantizer,
                "rotation": kind,
                "rounding": rounding,
                "bits": bits_per_weight(out),
                "KL": measured.kl,
                "KL stderr": measured.kl_stderr,
                "top-1": measured.top1,
                "perplexity": measured.perplexity,
                "16-bit perplexity": measured.reference_perplexity,
                "quantize s": round(seconds, 1) if made else "",
            }
        )
        report(name, device_name(device), rows, model=Path(model).name, text=text.name, windows=len(chosen))


if __name__ == "__main__":
    typer.run(main)
