"""What transforms of keys are made of, and what an error in each stream of a cache costs.

Keys are seen after the rotary embedding, so that their moments depend on where they stand. Windows are therefore read
at positions all over the context that is wanted: relative positions, and with them the model's own attention, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qpalette.calibration.attention_taps import watched
from qpalette.calibration.gradients import backward_of_drawn_labels, frozen
from qpalette.core.errors import InputError, UnsupportedError
from qpalette.kvcache import KeyMoments, Transform

Progress = Callable[[int, int], None]  # (windows done, windows in all)


@dataclass
class _KeySums:
    """Of one layer, running sums in float64 over tokens, on the model's device.

    total [heads, dim] and squares [heads, dim, dim] of keys; queries [heads, dim, dim], the second moment of those that
    read each head.
    """

    tokens: int
    total: Tensor
    squares: Tensor
    queries: Tensor

    @classmethod
    def like(cls, key: Tensor) -> _KeySums:
        heads, dim = key.shape[1], key.shape[-1]
        zeros = torch.zeros(heads, dim, dim, dtype=torch.float64, device=key.device)
        return cls(0, zeros[..., 0].clone(), zeros, zeros.clone())

    def add(self, query: Tensor, key: Tensor, skip: int) -> None:
        """query [batch, query heads, tokens, dim], key [batch, heads, tokens, dim]; the first `skip` keys are exact
        in a cache, and left out."""
        heads, dim = key.shape[1], key.shape[-1]
        keys = key[:, :, skip:].transpose(0, 1).reshape(heads, -1, dim).float()
        grouped = query.unflatten(1, (heads, -1)).transpose(0, 1).reshape(heads, -1, dim).float()
        self.tokens += keys.shape[1]
        self.total += keys.sum(1, dtype=torch.float64)
        self.squares += (keys.mT @ keys).double()
        self.queries += (grouped.mT @ grouped).double()

    @property
    def moments(self) -> KeyMoments:
        mean = self.total / self.tokens
        covariance = self.squares / self.tokens - mean[:, :, None] * mean[:, None, :]
        return KeyMoments(mean.float().cpu(), covariance.float().cpu(), (self.queries / self.tokens).float().cpu())


def spread_offsets(context: int, length: int, windows: int) -> list[int]:
    """Where each window of `length` tokens is read, all over `context` positions, whatever the order of windows: the
    golden ratio's steps."""
    room = max(0, context - length)
    return [round((index * 0.6180339887498949) % 1 * room) for index in range(windows)]


@torch.inference_mode()
def key_moments(
    model: Any, windows: Sequence[Tensor], context: int, skip: int, progress: Progress | None = None
) -> list[KeyMoments]:
    """Of each layer. `windows` are int64 [length] each, longer than `skip`; `context` is the cache's length that the
    moments are for. Raises InputError without windows, UnsupportedError as `watched`."""
    if not windows or max(map(len, windows)) <= skip:
        raise InputError(f"a calibration of keys needs windows of more than {skip} tokens")
    found: dict[int, _KeySums] = {}

    def take(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found.setdefault(layer, _KeySums.like(key)).add(query, key, skip)
        return key, value

    offsets = spread_offsets(context, max(map(len, windows)), len(windows))
    with watched(model, take):
        for done, (window, offset) in enumerate(zip(windows, offsets, strict=True), start=1):
            positions = torch.arange(len(window), device=model.device)[None] + offset
            model(window[None].to(model.device), position_ids=positions, use_cache=False)
            if progress is not None:
                progress(done, len(windows))
    if not found:
        raise UnsupportedError(f"no attention of {model.config.model_type} could be seen: use a white cache")
    return [found[layer].moments for layer in sorted(found)]


Cost = Callable[[Tensor], Tensor]
"""The gradient of a window's log likelihood by keys or values, [1, heads, tokens, dim] -> float [n], n costs."""
Probe = Callable[[int, Tensor, Tensor], tuple[Cost, Cost]]
"""(layer, key, value [1, heads, tokens, dim]) -> what errors in these keys, and in these values, cost."""


def stream_costs(
    model: Any, windows: Sequence[Tensor], probe: Probe, seed: int = 0, progress: Progress | None = None
) -> list[tuple[Tensor, Tensor]]:
    """KL per token, in nats to second order, by layer: float64 [n] for keys and for values, n as `probe` counts.

    Labels are drawn from the model, so that squares of gradients are Fisher's (`sensitivity.py`); one backward pass a
    window gives all streams. Raises InputError without windows, UnsupportedError as `watched`.
    """
    if not windows:
        raise InputError("there is no text to measure a cache on")
    found: dict[int, list[Tensor]] = {}

    def take(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        costs = probe(layer, key.detach(), value.detach())
        for place, (states, cost) in enumerate(zip((key, value), costs, strict=True)):
            states.register_hook(partial(_add, found, layer, place, cost))
        return key, value

    # Parameters are frozen: what keys and values depend on is where the gradient begins.
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, result: result.requires_grad_())
    try:
        with watched(model, take), frozen(model):
            for done, window in enumerate(windows, start=1):
                backward_of_drawn_labels(model, window, torch.Generator().manual_seed(seed + done - 1))
                if progress is not None:
                    progress(done, len(windows))
    finally:
        hook.remove()
    tokens = sum(len(window) - 1 for window in windows)
    return [(found[layer][0] / tokens, found[layer][1] / tokens) for layer in sorted(found)]


def _add(found: dict[int, list[Tensor]], layer: int, place: int, cost: Cost, gradient: Tensor) -> None:
    value = cost(gradient.float()).double()
    sums = found.setdefault(layer, [torch.zeros_like(value), torch.zeros_like(value)])
    sums[place] = sums[place] + value


def cost_of_errors(errors: Sequence[Tensor]) -> Cost:
    """Of these errors, [1, heads, tokens, dim] each: half the square of gradient . error, vector by vector."""
    return lambda gradient: torch.stack([0.5 * (gradient * error).sum(-1).square().sum() for error in errors])


def cost_of_noise(states: Tensor, transform: Transform, skip: int) -> Cost:
    """Per unit of distortion, of a code's own error, white and in proportion to y.y, y = A (x - m); where errors are
    shaped, after they are fed back. The first `skip` tokens are exact."""
    power = transform.apply(states).square().mean(-1)
    power[..., :skip] = 0
    spread = transform.inverse
    if transform.shaping is not None:
        feedback, gain = transform.shaping
        spread = spread @ torch.linalg.inv(feedback + torch.eye(feedback.shape[-1], device=feedback.device))
        power = power * gain.square()[:, None]

    def cost(gradient: Tensor) -> Tensor:
        return 0.5 * ((gradient @ spread).square().sum(-1) * power).sum()[None]

    return cost
