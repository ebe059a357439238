"""Where every measurement has its text from: a file, or the model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import InputError
from qpalette.evaluate.sampled_text import Progress, is_token_file, read_token_file, sample_windows
from qpalette.evaluate.windows import check_limit, read_text, token_windows
from qpalette.models.vocabulary import check_tokenizer, check_tokens, context_of, has_tokenizer
from qpalette.storage import local_path


def model_windows(
    text: str | Path | None,
    model: Any,
    tokenizer: Any,
    length: int,
    count: int | None,
    *,
    seed: int = 0,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> list[torch.Tensor]:
    """The first `count` windows of `length` tokens, int64 each: less in a model of shorter context.

    `text` is a UTF-8 file, of which `count` None takes all windows; a token file (`sampled_text`), whose windows are
    cut where they are longer and may be shorter; or None: `model` writes `count` windows, with `seed`, into the token
    file `keep`, from which an interrupted run goes on. Raises InputError for numbers or a file that cannot be used, and
    naming a token that the model does not know.
    """
    windows = _windows(text, model, tokenizer, length, count, seed, keep, progress)
    for window in windows:
        check_tokens(window.tolist(), model, tokenizer)
    return windows


def _windows(
    text: str | Path | None,
    model: Any,
    tokenizer: Any,
    length: int,
    count: int | None,
    seed: int,
    keep: Path | None,
    progress: Progress | None,
) -> list[torch.Tensor]:
    check_limit(count)
    if length < 2:
        raise InputError(f"a window must have at least 2 tokens, got {length}")
    length = min(length, context_of(model) or length)
    if text is None:
        assert count is not None, "how many windows to write"
        return sample_windows(model, tokenizer, count, length, seed, keep, progress)
    if is_token_file(text):
        pieces = (piece for window in read_token_file(text) for piece in window.split(length) if len(piece) > 1)
        return list(islice(pieces, count))
    check_tokenizer(tokenizer, model.name_or_path)
    return token_windows(text, tokenizer, length, count)


def check_text(text: str | Path | None, model: str | Path) -> None:
    """Raises InputError for a file that cannot be used with `model`, before minutes of loading. None is fine."""
    if text is None:
        return
    if is_token_file(text):
        read_token_file(text)
    else:
        read_text(text)
        check_tokenizer_of(model)


def check_tokenizer_of(model: str | Path) -> None:
    """Raises InputError when `model`, as `local_path` takes it, is a directory without a tokenizer: before it is
    loaded. A GGUF file's is looked at later."""
    place = local_path(model)
    if place.is_dir() and not any(place.glob("*.gguf")) and not has_tokenizer(place):
        check_tokenizer(None, model)


def text_sha256(text: str | Path | None, windows: Sequence[torch.Tensor]) -> str:
    """Of a text file's content; of the tokens where the model has written them."""
    if text is None or is_token_file(text):
        return hashlib.sha256(torch.cat(list(windows)).numpy().data).hexdigest()
    return hashlib.sha256(read_text(text).encode()).hexdigest()
