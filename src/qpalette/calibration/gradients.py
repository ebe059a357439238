"""Gradients of a model's own predictions: labels are drawn from what it predicts, so that squares are Fisher's."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def backward_of_drawn_labels(model: Any, window: Tensor, generator: torch.Generator) -> None:
    """One backward pass of -log p(labels), summed over the positions of a window, int64 [length >= 2].

    A label is drawn for each position but the last, on the CPU, so that `generator` gives the same on every device.
    """
    logits = model(window[None].to(model.device), use_cache=False).logits[0, :-1].float()
    with torch.no_grad():
        uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
        labels = (logits.softmax(-1).cumsum(-1) < uniform).sum(-1).clamp_(max=logits.shape[-1] - 1)
    F.cross_entropy(logits, labels, reduction="sum").backward()


@contextmanager
def frozen(model: nn.Module, all_but: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Parameters have no gradient, but for some; afterwards they are as before."""
    chosen = {id(parameter) for parameter in all_but}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
