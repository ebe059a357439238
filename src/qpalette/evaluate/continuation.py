"""What a model predicts after more and more tokens of several sequences: a cache grows, or a step is captured once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qpalette.backends.cuda.graphs import CAPTURE_WARMUP, Capture, capture_graph
from qpalette.evaluate.reserved_cache import cache_of, reserve
from qpalette.nn.coded_states import READER
from qpalette.nn.token_cache import ATTENTION, TokenCache, can_serve, writes_keys_out


class Continuation:
    """Of up to `length` tokens, read by `model` with a cache that grows."""

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length = model, length
        self._known: dict[str, Any] = {}
        self._last = last_logits(model)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, vocabulary] after `tokens`, int64 [batch, new tokens], and all before. Raises UnsupportedError for a
        model without a cache."""
        output = self.model(tokens.to(self.model.device), use_cache=True, **self._known, **self._last)
        name, cache = cache_of(output)
        if not self._known:
            reserve(cache, self.length)
        self._known = {name: cache}
        return output.logits[:, -1]


class CapturedContinuation:
    """The same over a cache of fixed length, one token at a time after the first call. The host starts a step once,
    where it would start hundreds of kernels; one that cannot be captured runs as it is.

    Logits are read before the next call, which writes over them.
    """

    def __init__(self, model: Any, length: int, capture: Capture) -> None:
        self.model, self.capture = model, capture
        self._cache = TokenCache(model.config, length)
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        self._last = last_logits(model)
        self._token = self._logits = torch.empty(0)
        self._graph: Any = None
        self._eager_steps = 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """As of `Continuation`."""
        if not self._cache.is_initialized:
            return self._read(tokens.to(self.model.device))
        if not len(self._token):
            self._token = tokens.to(self.model.device)
        self._token.copy_(tokens)
        if self._graph is None and self._eager_steps == CAPTURE_WARMUP:
            self._graph = self._captured()
        if self._graph is None:
            self._step()
            self._eager_steps += 1
        else:
            self._graph.replay()
        return self._logits

    def _captured(self) -> Any:
        try:
            return self.capture(self._step)
        except RuntimeError:  # it waits for the host, as the routing of some experts does
            return None

    def _step(self) -> None:
        logits = self._read(self._token)
        if not len(self._logits):
            self._logits = logits.clone()
        self._logits.copy_(logits)

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = {}
        if self._positions:
            first = self._cache.get_seq_length()
            given["position_ids"] = (first + torch.arange(tokens.shape[1], device=tokens.device))[None]
        output = self.model(tokens, past_key_values=self._cache, use_cache=True, **given, **self._last)
        return output.logits[:, -1]


@contextmanager
def continuing(model: Any, length: int) -> Iterator[Continuation | CapturedContinuation]:
    """The quick one, where there are CUDA graphs and `can_serve` says yes. There attention is "grouped" meanwhile in
    place of sdpa, which writes keys and values of the whole length once for each query that shares them."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if model.device.type != "cuda" or before not in ATTENTION or not can_serve(model):
        yield Continuation(model, length)
        return
    known = READER in ALL_ATTENTION_FUNCTIONS.valid_keys()  # what lies above registers it
    if known and writes_keys_out(config):
        model.set_attn_implementation(READER)
    try:
        yield CapturedContinuation(model, length, capture_graph)
    finally:
        model.set_attn_implementation(before)


def last_logits(model: Any) -> dict[str, int]:
    """The argument that leaves out the logits of all tokens but the last, where the class knows it."""
    name = "logits_to_keep"
    return {name: 1} if name in inspect.signature(model.forward).parameters else {}
