"""Prompts of several requests, read at once: the weights are decoded, and the layers' Python runs, once for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from transformers import DynamicCache

from qpalette.nn.token_cache import KeysAndValues

MOST = 2048  # tokens of one reading, padding counted: others get no token meanwhile
# An estimate of what a reading costs apart from its tokens, in tokens: so much padding is no worse than one more.
WORTH = 64

Item = TypeVar("Item")
Columns = tuple[int, list[KeysAndValues]]  # tokens, and of each layer their keys and values, [heads, tokens, width]


def read_together(
    model: Any, prompts: Sequence[torch.Tensor], like: Mapping[str, Any], shared: Columns | None = None
) -> list[Columns]:
    """What the layers keep of each prompt, int64 [tokens], but for its last token, which the next step reads.

    `shared`: what they keep of the first tokens, which are the same in all; `like`: what forward is given for one of
    the prompts. Prompts are padded behind their ends, where no token of theirs looks: there is no mask.
    """
    kept, layers = (0, []) if shared is None else shared
    lengths = [len(prompt) - 1 for prompt in prompts]
    rest = max(1, max(lengths) - kept)
    ids = prompts[0].new_zeros(len(prompts), rest)
    for row, prompt, length in zip(ids, prompts, lengths, strict=True):
        row[: length - kept] = prompt[kept:length]
    given = {**like, "input_ids": ids}
    if "position_ids" in like:
        given["position_ids"] = torch.arange(kept, kept + rest, device=ids.device).expand_as(ids)
    cache = DynamicCache()
    for index, both in enumerate(layers):
        keys, values = (each.expand(len(prompts), *each.shape) for each in both)
        cache.update(keys, values, index)
    model(**given, past_key_values=cache, use_cache=True, return_dict=True)
    read: list[Any] = cache.layers
    return [
        (length, [(layer.keys[row, :, :length], layer.values[row, :, :length]) for layer in read])
        for row, length in enumerate(lengths)
    ]


def readings(items: Sequence[Item], lengths: Sequence[int]) -> Iterator[list[Item]]:
    """The items whose prompts, of so many tokens, are read at once; the shortest first."""
    reading: list[int] = []
    for index in sorted(range(len(items)), key=lengths.__getitem__):
        padding = len(reading) * (lengths[index] - lengths[reading[-1]]) if reading else 0
        if reading and (padding > WORTH or (len(reading) + 1) * lengths[index] > MOST):
            yield [items[each] for each in reading]
            reading = []
        reading.append(index)
    if reading:
        yield [items[each] for each in reading]
