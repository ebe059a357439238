"""Measures what quantization costs: models against their originals, quantizers against Shannon's bound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qpalette.core.errors import InputError
from qpalette.evaluate.loading import bits_per_weight, is_artifact, load, load_model, plan_of, predicted_kl
from qpalette.evaluate.metrics import Evaluation, Progress, evaluate_models
from qpalette.evaluate.palette import Measurement, measure
from qpalette.evaluate.sampled_text import sample_windows
from qpalette.evaluate.text_source import model_windows
from qpalette.evaluate.windows import WINDOW, check_limit, token_windows
from qpalette.storage import local_path

__all__ = [
    "Evaluation",
    "Measurement",
    "bits_per_weight",
    "evaluate",
    "evaluate_models",
    "is_artifact",
    "load",
    "load_model",
    "measure",
    "model_windows",
    "plan_of",
    "predicted_kl",
    "sample_windows",
    "token_windows",
]

SAMPLED_WINDOWS = 2
SEED = 1_000_000  # of sampled text: never one that a model is likely to have been calibrated on


def evaluate(
    model_dir: str | Path,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    windows: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    writing: Progress | None = None,
) -> Evaluation:
    """Perplexity of the model at `model_dir`, and how far its predictions are from those of `reference`.

    Both are a quantized directory, a Hugging Face directory, a .gguf file or a Hub id; `reference` None measures the
    perplexity alone. `text` is a UTF-8 file, cut into windows of 2048 tokens (less in a model of shorter context), of
    which the first `windows` are used, by default all; or a file of sampled tokens. With `text` None the reference
    writes it, by default 2 windows, with another seed than what is calibrated on. `progress` is called with (windows
    done, windows in all), `writing` with (tokens written, tokens in all).

    Raises InputError for a text, device or number of windows that cannot be used, ArtifactError and CheckpointError for
    a model that cannot be read.
    """
    check_limit(windows)
    if text is None and reference is None:
        raise InputError("give a text, or a reference to sample one from")
    place = local_path(model_dir)
    model, tokenizer = load_model(place, device, dtype)
    original, tokenizer = (None, tokenizer) if reference is None else load_model(reference, device, dtype)
    count = windows if text is not None else windows or SAMPLED_WINDOWS
    chosen = model_windows(text, original or model, tokenizer, WINDOW, count, seed=SEED, progress=writing)
    return replace(
        evaluate_models(model, original, chosen, progress),
        bits_per_weight=bits_per_weight(place),
        predicted_kl=predicted_kl(place),
    )
