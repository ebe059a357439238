"""The tokens that a model knows, how many at a time, and the tokenizer that it may lack."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qpalette.core.errors import InputError

# What tokenizers of all kinds are kept in; a model directory with none of them has none.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "tekken.json", "*.model", "*.tiktoken", "*.spm", "*.bpe")


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory has any file of a tokenizer."""
    return any(file.is_file() for pattern in TOKENIZER_FILES for file in directory.glob(pattern))


def check_tokenizer(tokenizer: Any, model: str | Path) -> None:
    """Raises InputError where there is none: `tokenizer` is None."""
    if tokenizer is None:
        raise InputError(
            f"{model} has no tokenizer, and text needs one: copy its tokenizer.json and tokenizer_config.json (or what "
            "else it has) there, beside config.json"
        )


def check_tokens(tokens: Iterable[int], model: Any, tokenizer: Any = None) -> None:
    """Raises InputError naming the first token that `model`, a transformers model, has no embedding for, spelled by
    `tokenizer` where there is one."""
    embeddings = model.get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", None)
    if known is None:
        return
    for token in tokens:
        if token >= known:
            spelled = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
            raise InputError(
                f"the text has token {token}{spelled}, but the model knows {known}: take the tokenizer that the model "
                "was made with, or resize its embeddings (resize_token_embeddings) and quantize it again"
            )


def context_of(model: Any) -> int | None:
    """The most tokens that a model was made for; None when its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
