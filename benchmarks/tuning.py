"""What tuning is worth: KL on test text before and after, for quantized models, with the time that it took.

python benchmarks/tuning.py MODEL ARTIFACT [ARTIFACT ...] --text FILE --test FILE [--windows 16] [--device cuda]
                            [--steps 150] [--batch 4] [--profile] [--sampled] [--keep-size] [--cache] [--name tuning]

`--text` is what is tuned on, `--test` what is measured on. With `--sampled` each is also tuned on text that the
original writes, and measured on text that it writes with another seed. With `--profile` it is told where the seconds of
tuning go (`where_time_goes.py`): take few steps then. The peak counts a third model, for measuring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import device_name, report
from where_time_goes import profiled

from qpalette.evaluate import bits_per_weight, evaluate_models, load_model, model_windows
from qpalette.tuning import Silent, Tuning, tune

LENGTH, TEST_SEED = 2048, 1_000_000


class Timed(Silent):
    """When each stage began, and each look at held-out text."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.looks: list[tuple[int, float]] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        self.began.setdefault(stage, time.perf_counter())

    def writing_seconds(self) -> float:
        began = sorted(self.began.values())
        return began[1] - began[0] if "text" in self.began and len(began) > 1 else 0.0

    def held_out(self, step: int, kl: float) -> None:
        self.looks.append((step, kl))
        print(f"step {step}: held-out KL {kl:.4f}", flush=True)


def main(
    model: str,
    artifacts: list[str],
    text: Annotated[Path, typer.Option()],
    test: Annotated[Path, typer.Option()],
    windows: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    steps: int = 150,
    batch: int = 4,
    learning_rate: float = 1e-3,
    sampled: bool = False,
    keep_size: bool = False,
    cache: bool = False,
    recompute: bool = True,
    profile: Annotated[bool, typer.Option(help="Tell where the seconds go.")] = False,
    work: Annotated[Path, typer.Option(help="Where tuned models go; kept, so that a rerun is quick.")] = Path("out"),
    name: str = "tuning",
) -> None:
    original, tokenizer = load_model(model, device)
    tests = {"test": model_windows(test, original, tokenizer, LENGTH, windows)}
    if sampled:
        tests["sampled"] = model_windows(None, original, tokenizer, LENGTH, windows, seed=TEST_SEED)

    def kl_of(place: str | Path) -> dict[str, float | None]:
        quantized = load_model(place, device)[0]
        return {kind: evaluate_models(quantized, original, chosen).kl for kind, chosen in tests.items()}

    tuning = Tuning(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        keep_size=keep_size,
        cache=cache,
        recompute=recompute,
    )
    rows: list[dict[str, Any]] = []
    for artifact in artifacts:
        before = kl_of(artifact)
        for tuned_on in [text, None] if sampled else [text]:
            rows.append(_row(model, artifact, tuned_on, tuning, device, dtype, work, before, kl_of, profile))
            facts = {"model": Path(model).name, "text": text.name, "test": test.name, "tuning": vars(tuning)}
            report(name, device_name(device), rows, **facts, windows=windows)


def _row(
    model: str,
    artifact: str,
    text: Path | None,
    tuning: Tuning,
    device: str,
    dtype: str,
    work: Path,
    before: dict[str, float | None],
    kl_of: Callable[[Path], dict[str, float | None]],
    profile: bool,
) -> dict[str, Any]:
    out = work / f"{Path(artifact).name}-tuned-{'sampled' if text is None else text.stem}"
    watcher, start = Timed(), time.perf_counter()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    made = not out.exists()
    if made:
        run = partial(tune, artifact, model, text, out, tuning=tuning, device=device, dtype=getattr(torch, dtype),
                      watcher=watcher)  # fmt: skip
        profiled("tune", run) if profile else run()
    seconds = time.perf_counter() - start
    after = kl_of(out)
    looks: Sequence[tuple[int, float]] = watcher.looks
    return {
        "artifact": Path(artifact).name,
        "tuned on": "sampled text" if text is None else text.name,
        "bits before": bits_per_weight(artifact),
        "bits": bits_per_weight(out),
        **{f"KL {kind} before": kl for kind, kl in before.items()},
        **{f"KL {kind}": kl for kind, kl in after.items()},
        "held-out": [kl for _, kl in looks],
        "seconds": round(seconds, 1) if made else "",
        "of them writing text": round(watcher.writing_seconds(), 1) if made else "",
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2) if made and device.startswith("cuda") else "",
    }


if __name__ == "__main__":
    typer.run(main)
