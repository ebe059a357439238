"""Calls that join folders which do not know each other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from qpalette.calibrate import MEMORY_BUDGET, Progress, collect_hessians
from qpalette.checkpoint import find_groups, open_checkpoint
from qpalette.core.errors import InputError
from qpalette.evaluate.loading import load_model
from qpalette.evaluate.windows import WINDOW, read_text, token_windows
from qpalette.kernels.device import parse_device
from qpalette.pipeline.hessians import Calibration, HessianStore

TOKENS = 65_536


def calibrate(
    model: str | Path,
    hessians: str | Path,
    text: str | Path,
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_budget_bytes: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the Hessians of all groups of linears of `model` into the directory `hessians`, for `quantize`.

    `model` is a directory, a .gguf file or a Hub id; `text` a UTF-8 file, of which the first `tokens` are read in
    windows of `window` tokens (less in a model of shorter context). Interrupted, the same call goes on where it
    stopped. `progress` is called with (windows done, windows in all). Returns what was measured on.

    Raises InputError for a text or a number that cannot be used, CheckpointError for a model that cannot be read, and
    HessianError as `collect_hessians` does.
    """
    if tokens < 2 or window < 2:
        raise InputError(f"tokens and window must be at least 2, got {tokens} and {window}")
    where = str(parse_device(device))
    content = read_text(text)  # a wrong file is told before minutes of loading
    checkpoint = open_checkpoint(model)
    loaded, tokenizer = load_model(model, where, dtype)
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or window
    length = min(window, context, tokens)
    windows = token_windows(text, tokenizer, length, tokens // length)
    calibration = Calibration(
        source=checkpoint.fingerprint,
        text_sha256=hashlib.sha256(content.encode()).hexdigest(),
        tokens=sum(map(len, windows)),
        window=length,
    )
    store = HessianStore(hessians, calibration)
    groups = find_groups(checkpoint).groups
    collect_hessians(loaded, windows, groups, store, memory_budget_bytes=memory_budget_bytes, progress=progress)
    return calibration
