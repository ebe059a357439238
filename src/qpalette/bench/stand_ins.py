"""Transforms of keys that take the time of calibrated ones, for a model of random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qpalette.kvcache import SHAPED, WHITE, CachePlan, Transform, white
from qpalette.kvcache.vectors import BLOCK
from qpalette.nn.coded_cache import CodedCache


@torch.no_grad()
def stand_ins(model: Any, plan: CachePlan) -> list[Transform] | None:
    """Of each layer, a matrix for each head, and errors fed back where `plan` is shaped; None where it needs none. What
    they do to the keys is of no use: speed does not depend on it."""
    if plan.transform == WHITE:
        return None
    probe = CodedCache(model.config, replace(plan, transform=WHITE), 1)
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=probe, use_cache=True)
    return [_stand_in(layer.num_heads, layer.key_stream.format.dim, plan) for layer in probe.layers]


def _stand_in(heads: int, dim: int, plan: CachePlan) -> Transform:
    plain = white(dim)
    parts = [plain.matrix, plain.inverse, plain.mean]
    if plan.transform == SHAPED:
        parts += [torch.ones(1, dim, dim).tril(-BLOCK) / dim, torch.ones(1)]
    return Transform(*(part.repeat(heads, *[1] * (part.ndim - 1)) for part in parts))
