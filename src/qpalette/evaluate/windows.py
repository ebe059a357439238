"""A text file as the windows of tokens that perplexity is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import InputError

WINDOW = 2048  # the length that published perplexities use
CHARACTERS = 8  # read for each token that is wanted, and twice as many as long as they are too few
SPARE = 64  # tokens before a cut that may be others in the whole text


def read_text(file: str | Path) -> str:
    """The content of a UTF-8 text file, not empty. Raises InputError that names the file and what is wrong with it."""
    path = Path(file).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; give a text file")
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise InputError(f"{path} is not text: it holds a zero byte at character {text.index(chr(0))}")
    if not text.strip():
        raise InputError(f"{path} is empty; give a text of at least a few words")
    return text


def token_windows(
    file: str | Path, tokenizer: Any, length: int = WINDOW, limit: int | None = None
) -> list[torch.Tensor]:
    """Non-overlapping windows of the file's tokens, int64 [length] each, the first `limit` of them.

    No BOS token is added. The tail that fills no window is dropped, unless it is all there is. `tokenizer` is a
    transformers tokenizer. Raises InputError as `read_text` does, when `limit` is below 1, and for a text of fewer
    than 2 tokens: there is nothing to predict.
    """
    check_limit(limit)
    tokens = torch.tensor(_tokens(read_text(file), tokenizer, limit and limit * length), dtype=torch.int64)
    if len(tokens) < 2:
        raise InputError(f"{file} has {len(tokens)} token(s); at least 2 are needed to predict one from the other")
    whole = len(tokens) // length
    if whole == 0:
        return [tokens]
    return list(tokens[: whole * length].split(length))[:limit]


def _tokens(text: str, tokenizer: Any, count: int | None) -> list[int]:
    """The first `count` tokens of a text, which may be far longer; fewer, or with None, are all of them."""
    characters = len(text) if count is None else CHARACTERS * (count + SPARE)
    while True:
        tokens: list[int] = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        if characters >= len(text):
            return tokens if count is None else tokens[:count]
        assert count is not None, "all of the text was asked for"
        if len(tokens) >= count + SPARE:
            return tokens[:count]
        characters *= 2


def check_limit(limit: int | None) -> None:
    """Raises InputError unless `limit` is None (all windows) or at least 1."""
    if limit is not None and limit < 1:
        raise InputError(f"the number of windows must be at least 1, got {limit}")
