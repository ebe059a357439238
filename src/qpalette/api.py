"""Calls that join folders which do not know each other."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qpalette.calibration import MEMORY_BUDGET, Progress, collect_hessians
from qpalette.calibration.hessians import Calibration, HessianStore
from qpalette.calibration.sensitivity import (
    DISTORTION,
    METHODS,
    embeddings_of,
    fisher_sensitivities,
    perturbation_sensitivities,
    weights_of,
)
from qpalette.core.errors import InputError
from qpalette.core.records import LinearShape
from qpalette.core.resume import PartialFigures
from qpalette.evaluate import loading
from qpalette.evaluate.loading import load_model
from qpalette.evaluate.sampled_text import TOKEN_FILE
from qpalette.evaluate.text_source import check_text, context_of, model_windows, text_sha256
from qpalette.evaluate.windows import WINDOW
from qpalette.generation import check_mode
from qpalette.generation import fast as make_fast
from qpalette.models import find_groups
from qpalette.plan import SensitiveLinear, Sensitivities
from qpalette.runtime.device import parse_device
from qpalette.storage import Checkpoint, open_checkpoint

TOKENS = 65_536
SENSITIVITY_TOKENS = {"fisher": 16_384, "perturbation": 2048}  # one backward pass in all, against one pass per linear


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | torch.device | int | None = None,
    backend: str | None = None,
    fast: bool = False,
    compile: str = "never",
) -> tuple[Any, Any]:
    """The causal language model at `path`, a `PreTrainedModel` in evaluation mode, and its tokenizer.

    path: a quantized directory, a Hugging Face directory, a .gguf file or the Hub id of a model of either kind. A GGUF
    file is dequantized once, into a cache. No code of the model runs. device: where all of it goes, such as cpu or
    cuda:1; device_map, as in `from_pretrained`, spreads it instead. dtype: of the activations and of what is not
    quantized; the checkpoint's own by default. backend: the only one that may run, by name; like the variable
    QPALETTE_BACKEND, which it sets, it holds for the whole process. fast: on one CUDA device, `model.generate` decodes
    by captured steps, with the same arguments and results, and compiles them as `compile` says: "never", in the
    "background", or "now", before the first token.

    Raises InputError when there is no such device or `compile`, UnsupportedError with the reasons when no backend can
    run the model, and ArtifactError or CheckpointError when there is no intact model or transformers cannot build it.
    """
    check_mode(compile)
    model, tokenizer = loading.load(path, device=device, dtype=dtype, device_map=device_map, backend=backend)
    return (make_fast(model, compile) if fast else model), tokenizer


def calibrate(
    model: str | Path,
    hessians: str | Path,
    text: str | Path | None = None,
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_budget_bytes: int = MEMORY_BUDGET,
    progress: Progress | None = None,
    writing: Progress | None = None,
) -> Calibration:
    """Measure the Hessians of all groups of linears of `model` into the directory `hessians`, for `quantize`.

    `model` is a directory, a .gguf file or a Hub id; `text` a UTF-8 file, of which the first `tokens` are read in
    windows of `window` tokens (less in a model of shorter context), or a file of sampled tokens. With `text` None the
    model writes it, into such a file in `hessians`. Interrupted, the same call goes on where it stopped. `progress` is
    called with (windows done, windows in all), `writing` with (tokens written, tokens in all). Returns what was
    measured on.

    Raises InputError for a text or a number that cannot be used, CheckpointError for a model that cannot be read, and
    HessianError as `collect_hessians` does.
    """
    if tokens < 2 or window < 2:
        raise InputError(f"tokens and window must be at least 2, got {tokens} and {window}")
    where = str(parse_device(device))
    check_text(text)  # a wrong file is told before minutes of loading
    checkpoint = open_checkpoint(model)
    loaded, tokenizer = load_model(checkpoint.location, where, dtype)
    keep = Path(hessians).expanduser() / f"text{TOKEN_FILE}"
    windows = _windows(loaded, tokenizer, text, tokens, window, 0, keep, writing)
    calibration = Calibration(
        source=checkpoint.fingerprint,
        text_sha256=text_sha256(text, windows),
        tokens=sum(map(len, windows)),
        window=len(windows[0]),
    )
    store = HessianStore(hessians, calibration)
    groups = find_groups(checkpoint).groups
    collect_hessians(loaded, windows, groups, store, memory_budget_bytes=memory_budget_bytes, progress=progress)
    return calibration


def measure_sensitivities(
    model: str | Path,
    out: str | Path,
    text: str | Path | None = None,
    *,
    method: str = "fisher",
    tokens: int | None = None,
    window: int = WINDOW,
    distortion: float = DISTORTION,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    writing: Progress | None = None,
) -> Sensitivities:
    """Measure the sensitivity of every linear of `model`, embeddings and output head included, into the JSON `out`.

    `model` is a directory, a .gguf file or a Hub id; `text` a UTF-8 file, of which the first `tokens` are read in
    windows of `window` tokens, or None: the model itself writes the text, into `out`.tokens.json, from which others
    may read it. `method` is "fisher", one backward pass, or
    "perturbation", noise of `distortion` into one linear after the other. Interrupted, the same call goes on where it
    stopped, from `out`.partial. `progress` is called with (steps done, steps in all), `writing` with (tokens written,
    tokens in all).

    Raises InputError for a method, text or number that cannot be used, CheckpointError for a model that cannot be read.
    """
    if method not in METHODS:
        raise InputError(f"'{method}' is no method: choose {' or '.join(METHODS)}")
    if not 0 < distortion < 1:
        raise InputError(f"the distortion of the noise must lie between 0 and 1, got {distortion:g}")
    where, target = str(parse_device(device)), Path(out).expanduser()
    if not target.absolute().parent.is_dir():
        raise InputError(
            f"{target.absolute().parent} does not exist; make it, or choose another place for {target.name}"
        )
    check_text(text)  # a wrong file is told before minutes of loading
    checkpoint = open_checkpoint(model)
    loaded, tokenizer = load_model(checkpoint.location, where, dtype)
    keep = target.with_name(target.name + TOKEN_FILE)
    windows = _windows(loaded, tokenizer, text, tokens or SENSITIVITY_TOKENS[method], window, seed, keep, writing)
    provenance = {
        "qpalette": version("qpalette"),
        "method": method,
        "source": checkpoint.fingerprint,
        "text": "sampled" if text is None else Path(text).name,
        "tokens_sha256": hashlib.sha256(torch.cat(list(windows)).numpy().tobytes()).hexdigest(),
        "tokens": str(sum(map(len, windows))),
        "window": str(len(windows[0])),
        "seed": str(seed),
        **({"distortion": repr(distortion)} if method == "perturbation" else {}),
    }
    linears = _measurable(loaded, checkpoint)
    partial = PartialFigures(target.with_name(target.name + ".partial"), provenance)
    names = [linear.name for linear in linears]
    if method == "fisher":
        values = fisher_sensitivities(loaded, windows, names, seed=seed, partial=partial, progress=progress)
    else:
        values = perturbation_sensitivities(
            loaded, windows, names, distortion=distortion, seed=seed, partial=partial, progress=progress
        )
    measured = tuple(replace(linear, sensitivity=values[linear.name]) for linear in linears)
    found = Sensitivities(measured, provenance)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(found.to_json(), encoding="utf-8")
    os.replace(temporary, target)
    partial.remove()
    return found


def _windows(
    model: Any,
    tokenizer: Any,
    text: str | Path | None,
    tokens: int,
    window: int,
    seed: int,
    keep: Path,
    writing: Progress | None,
) -> list[torch.Tensor]:
    """The first `tokens` of a text, or as many that the model writes into `keep`."""
    if tokens < 2 or window < 2:
        raise InputError(f"tokens and window must be at least 2, got {tokens} and {window}")
    length = min(window, context_of(model) or window, tokens)
    return model_windows(text, model, tokenizer, length, tokens // length, seed=seed, keep=keep, progress=writing)


def _measurable(model: object, checkpoint: Checkpoint) -> list[SensitiveLinear]:
    """The linears that are quantized, then embeddings and output head where they are not among them."""
    linears = [
        SensitiveLinear(shape, group.name, 0.0) for group in find_groups(checkpoint).groups for shape in group.linears
    ]
    listed = {linear.name for linear in linears}
    for name in embeddings_of(model):
        if name not in listed:
            rows, columns = weights_of(model, [name])[name].values.shape  # type: ignore[arg-type]
            linears.append(SensitiveLinear(LinearShape(name, rows, columns), name, 0.0, listed=False))
    return linears
