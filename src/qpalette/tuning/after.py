"""Quantize and tune in one go: OUT appears tuned, or not at all."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from qpalette.core.resume import PartialFigures
from qpalette.evaluate.text_source import check_text
from qpalette.pipeline import Progress, quantize
from qpalette.pipeline.output import Output
from qpalette.plan import Plan, Sensitivities
from qpalette.storage import open_checkpoint
from qpalette.tuning.options import Tuning, Watcher
from qpalette.tuning.run import TuneReport, tune

QUANTIZED = "quantized"


def quantize_and_tune(
    model: str | Path,
    out: str | Path,
    text: str | Path | None = None,
    *,
    tuning: Tuning | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: Progress | None = None,
    watcher: Watcher | None = None,
    **options: Any,
) -> TuneReport:
    """`qpalette.quantize` with `options`, then `tune` with `text`; the size stays what the options ask for, unless
    `tuning` says otherwise.

    Between the two the model lies in `OUT.untuned`, from which the same call goes on. Raises as both do.
    """
    target = Path(out).expanduser().resolve()
    check_text(text, model)
    Output(target, overwrite).check()
    untuned = target.with_name(f"{target.name}.untuned")
    made_from = {"model": open_checkpoint(model).fingerprint, "device": device}
    made_from |= {name: _described(value) for name, value in options.items()}
    mark = PartialFigures(untuned.with_name(f"{untuned.name}.json"), made_from)
    if not (mark.figures.get(QUANTIZED) and untuned.is_dir()):
        quantize(model, untuned, device=device, progress=progress, overwrite=True, **options)
        mark.figures[QUANTIZED] = True
        mark.save()
    report = tune(
        untuned,
        model,
        text,
        target,
        tuning=tuning or Tuning(keep_size=True),
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        watcher=watcher,
    )
    shutil.rmtree(untuned)
    mark.remove()
    return report


def _described(value: Any) -> str:
    """An option's value; of a file its content, of a folder what lies in it and since when."""
    if isinstance(value, Plan | Sensitivities):
        return value.to_json()
    if isinstance(value, str | Path) and (path := Path(value).expanduser()).exists():
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        stats = {file.name: file.stat() for file in sorted(path.iterdir())}
        return repr({name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()})
    return repr(value)
