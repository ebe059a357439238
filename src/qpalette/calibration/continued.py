"""A model that goes on from one of its layers, where nothing below it has changed since its first pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


class Continued:
    """Logits of `model`, a transformers model in evaluation mode, on `windows`, int64 [length >= 2] each.

    What comes out of its layers is kept at the beginnings of as many as `parts` runs of layers, [length, hidden] for
    each window, on the device of the model. Layers below do not run then: they hand on what is kept. Whether that gives
    the logits of the whole model is tried at the first use of each beginning; a class in which layers know more of each
    other than hidden states, such as shared keys and values, is run as a whole.
    """

    def __init__(self, model: Any, windows: Sequence[Tensor], parts: int) -> None:
        self.model, self.windows = model, windows
        self.layers = _layers_of(model)
        count = len(self.layers)
        self._kept: dict[int, list[Any]] = {
            start: [] for start in (count * part // parts for part in range(1, parts)) if start
        }
        self._works: dict[int, bool] = {}
        places = reversed(list(enumerate(self.layers)))  # what several layers share changes with the first of them
        self._layer_of = {id(parameter): place for place, layer in places for parameter in layer.parameters()}

    def first(self, index: int) -> Tensor:
        """Of the `index`-th window, the whole model, whose layers are remembered: [length, vocabulary]."""
        hooks = [
            self.layers[start - 1].register_forward_hook(lambda *call, kept=kept: kept.append(_copy(call[-1])))
            for start, kept in self._kept.items()
        ]
        try:
            return self._logits(index)
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, index: int, changed: Collection[nn.Parameter]) -> Tensor:
        """Of the `index`-th window, [length, vocabulary]; since its first pass no parameters but `changed` may be
        others; with none of them named, any."""
        start = self._start(changed)
        if start and start not in self._works:
            whole = self._logits(0)
            self._works[start] = self._gives(start, whole)
            if index == 0:
                return whole
        return self._logits(index, start if self._works.get(start) else 0)

    def _start(self, changed: Collection[nn.Parameter]) -> int:
        lowest = min((self._layer_of.get(id(parameter), 0) for parameter in changed), default=0)
        return max((start for start in self._kept if start <= lowest), default=0)

    def _gives(self, start: int, whole: Tensor) -> bool:
        try:
            return torch.equal(self._logits(0, start), whole)
        except Exception:  # whatever a model's code raises that misses something of its layers
            return False

    @torch.inference_mode()
    def _logits(self, index: int, start: int = 0) -> Tensor:
        with self._skipped(index, start):
            logits: Tensor = self.model(self.windows[index][None].to(self.model.device), use_cache=False).logits
        return logits[0]

    @contextmanager
    def _skipped(self, index: int, start: int) -> Iterator[None]:
        """Inside, the layers below `start` do nothing."""
        below = self.layers[:start]
        for layer in below:
            layer.forward = partial(_hand_on, self._kept[start][index])
        try:
            yield
        finally:
            for layer in below:
                del layer.forward  # the class's own is there again


def _layers_of(model: nn.Module) -> list[Any]:
    """The longest list of layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    layered = [list(each) for each in lists if all(isinstance(item, GradientCheckpointingLayer) for item in each)]
    return max(layered, key=len, default=[])


def _hand_on(output: Any, *arguments: Any, **options: Any) -> Any:
    return _copy(output)  # the next layer may write into it


def _copy(output: Any) -> Any:
    """Of what a layer gives: hidden states, or a tuple with them."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copy, output)) if isinstance(output, tuple) else output
