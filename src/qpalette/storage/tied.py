"""Embedding and output head: one matrix under two names, or two matrices that the config takes for one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger(__name__)

EMBEDDING = re.compile(r"(?:\w+\.)*(?:embed_tokens|embeddings|embed_in|wte|word_embeddings|tok_embeddings)")
OUTPUT_HEAD = re.compile(r"(?:\w+\.)*(?:lm_head|output_layer|embed_out)")
TIED = "tie_word_embeddings"


def with_own_head(config: dict[str, Any], names: Iterable[str], same: Callable[[str, str], bool]) -> dict[str, Any]:
    """`config`, untied where the tensors `names` have a head that is not the embedding, which transformers then uses.

    `same` says whether two tensors have equal bytes; it is asked only where the config ties and both are there.
    """
    if not (config.get(TIED) or _text_of(config).get(TIED)):
        return config
    weights = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    embeddings = sorted(filter(EMBEDDING.fullmatch, weights))
    for head in sorted(filter(OUTPUT_HEAD.fullmatch, weights)):
        if embeddings and not any(same(f"{head}.weight", f"{embedding}.weight") for embedding in embeddings):
            logger.warning(
                "config.json ties %s to %s, but the file has both, and they differ: the head of the file is used, as "
                "transformers does, and the result says so",
                *(head, ", ".join(embeddings)),
            )
            inner = {key: {**value, TIED: False} for key, value in config.items() if value is _text_of(config)}
            return {**config, **inner, TIED: False}
    return config


def _text_of(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}
