"""The static cache of a session: how long it is, and what of it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qpalette.kvcache import CachePlan, Transform
from qpalette.nn.coded_cache import CodedCache
from qpalette.nn.token_cache import TokenCache


class CodedTokenCache(CodedCache):
    """A `TokenCache` of codes."""

    def __init__(
        self,
        config: Any,
        length: int,
        plan: CachePlan,
        transforms: Sequence[Transform] | None,
        like: CodedTokenCache | None = None,
    ) -> None:
        super().__init__(config, plan, length, transforms)
        self.config, self.transforms = config, transforms
        if like is not None:
            self._take_memory(like)

    def empty_like(self) -> CodedTokenCache:
        """As `TokenCache`."""
        return CodedTokenCache(self.config, self.length, self.plan, self.transforms, self)

    def begin(self, mask: torch.Tensor | None) -> None:
        """A prompt with this attention mask, [batch, tokens], comes: exact first tokens are those that it shows."""
        for layer in self.layers:
            layer.set_starts(None if mask is None else mask.long().argmax(-1))

    def set_length(self, tokens: int) -> None:
        """As `TokenCache`."""
        for layer in self.layers:
            layer.set_length(tokens)

    def clear(self, start: int, end: int) -> None:
        """Codes are finite, and exact tokens beyond the length are not read."""

    def copy(self, other: CodedTokenCache, tokens: int) -> None:
        """As `TokenCache`."""
        if not self.is_initialized:
            self._take_memory(other)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.copy(theirs, tokens)

    def _take_memory(self, like: CodedTokenCache) -> None:
        for layer, other in zip(self.layers, like.layers, strict=True):
            layer.take_memory(other)


SessionCache = TokenCache | CodedTokenCache
CacheMaker = Callable[[Any, int], SessionCache]  # (config, length) -> an empty one
