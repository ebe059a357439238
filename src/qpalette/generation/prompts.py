"""Prompts read by captured work: a few shapes serve all, and the host starts each as one.

Read eagerly, a prompt costs the host as much as it costs to start every kernel of every layer: a client alone waits
52 ms for the first token of SmolLM2 at 3.25 bits on an H200 (`benchmarks/results/serve_load_h200.json`), and all who
are answered beside it would wait as long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from qpalette.generation.together import Columns
from qpalette.nn.token_cache import KeysAndValues, TokenCache

LEAST = 64  # tokens of a sequence in a shape
MOST = 1024  # tokens of a shape


def shape_of(lengths: Sequence[int], context: int | None = None) -> tuple[int, int] | None:
    """(sequences, tokens of each) of the least shape for so many tokens; None where that is too large. Not beyond the
    model's context, unless the tokens are: a table of positions ends there."""
    longest = max(lengths)
    rows, tokens = _power(len(lengths)), max(LEAST, _power(longest))
    if context is not None:
        tokens = min(tokens, max(longest, context))
    return (rows, tokens) if rows * tokens <= MOST else None


def _power(least: int) -> int:
    return 1 << (max(least, 1) - 1).bit_length()


class Reading:
    """One shape: memory for its tokens, and the work that reads them into the first `tokens` columns of its cache."""

    name = "the reading of prompts"
    is_compiled = False

    def __init__(self, model: Any, rows: int, tokens: int, like: Mapping[str, Any], memory: Memory) -> None:
        self.model, device = model, model.device
        self.ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        self.given = {name: value for name, value in like.items() if name != "input_ids"}
        if "position_ids" in like:
            self.given["position_ids"] = torch.arange(tokens, device=device).expand_as(self.ids)
        self.cache = memory.cache(model.config, rows, tokens)
        self.warm = 0  # runs
        self.graph: Any = None
        self.stays_eager = False

    def run(self) -> None:
        """What a graph of it replays."""
        self.cache.set_length(0)
        self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, return_dict=True, **self.given)

    def put(self, prompts: Sequence[torch.Tensor]) -> None:
        """int64 [tokens] each, for the next run. Behind their ends, where no token of theirs looks, is anything."""
        for row, prompt in zip(self.ids, prompts, strict=False):
            row[: len(prompt)] = prompt


class Memory:
    """Of MOST tokens in each layer: that of all shapes, as no two of them are read at once."""

    def __init__(self, like: Sequence[KeysAndValues]) -> None:
        """like: what a cache's `read` gives of a sequence."""
        self.like = [(keys[:, :0], values[:, :0]) for keys, values in like]
        self.numbers = [(_numbers_like(keys), _numbers_like(values)) for keys, values in like]

    def cache(self, config: Any, rows: int, tokens: int) -> TokenCache:
        """Of this shape, in this memory."""
        cache = TokenCache(config, tokens)
        cache.take_memory(rows, self.like)
        cache.lie_in(self.numbers)
        return cache


def _numbers_like(each: torch.Tensor) -> torch.Tensor:
    return each.new_zeros(MOST * each.shape[0] * each.shape[-1])


class Prompts:
    """Reads prompts of a model with this context. `do` runs a Reading, or replays what was captured of it."""

    def __init__(self, model: Any, context: int | None, do: Callable[[Reading], None]) -> None:
        self.model, self.context, self.do = model, context, do
        self.memory: Memory | None = None
        self.readings: dict[Hashable, Reading] = {}

    def at_once(self, lengths: Sequence[int]) -> int:
        """How many of the first prompts, of so many tokens, have a shape together."""
        counts = range(len(lengths), 0, -1)
        return next((count for count in counts if shape_of(lengths[:count], self.context) is not None), 0)

    def read(
        self, prompts: Sequence[torch.Tensor], given: Mapping[str, Any], like: Sequence[KeysAndValues]
    ) -> list[Columns] | None:
        """As `read_together`, in memory that the next reading writes over; None for prompts of no shape.

        like: what a cache has of any sequence of this model.
        """
        shape = shape_of([len(prompt) for prompt in prompts], self.context)
        if shape is None:
            return None
        key = (*shape, "position_ids" in given, given.get("logits_to_keep"))
        if key not in self.readings:
            self.memory = self.memory or Memory(like)
            self.readings[key] = Reading(self.model, *shape, given, self.memory)
        reading = self.readings[key]
        reading.put(prompts)
        self.do(reading)
        return [(len(ids) - 1, reading.cache.views(row, 0, len(ids) - 1)) for row, ids in enumerate(prompts)]
