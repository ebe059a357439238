"""The weight of a linear in a checkpoint: a tensor of its own, a part of one, or what transformers makes of several."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch

from qpalette.core.records import LinearShape
from qpalette.models.experts import EXPERT
from qpalette.models.names import Unit, convert
from qpalette.models.resolver import resolve
from qpalette.storage import Checkpoint


def tensors_of(checkpoint: Checkpoint, linear: str) -> tuple[str, ...]:
    """The names of the tensors that hold the weight of a linear."""
    held = resolve(checkpoint).held(linear)
    return (held.tensor,) if held.unit.of_experts else held.unit.all_tensors


def whole_of(checkpoint: Checkpoint, linear: str) -> str:
    """What is packed as a whole or not at all: a module of experts, a tensor that holds several linears, the linear."""
    if expert := EXPERT.fullmatch(linear):
        return expert["experts"]
    tensors = tensors_of(checkpoint, linear)
    return linear if len(tensors) == 1 and tensors[0] == f"{linear}.weight" else tensors[0]


def weight_bytes(checkpoint: Checkpoint, linear: LinearShape) -> int:
    """What the weight of a linear takes on disk."""
    return linear.weights * checkpoint.tensors[tensors_of(checkpoint, linear.name)[0]].dtype.itemsize


def transposed_modules(checkpoint: Checkpoint, linears: Iterable[str]) -> list[str]:
    """Those whose module holds in_features x out_features, such as a Conv1D of GPT-2; experts are not asked for."""
    places = {name: resolve(checkpoint).held(name).place for name in linears}
    return [name for name, place in places.items() if place.transposed and place.expert is None]


def read_weight(checkpoint: Checkpoint, linear: str) -> torch.Tensor:
    """The weight of a linear, [out_features, in_features]. Raises CheckpointError as `Checkpoint.read` does."""
    held = resolve(checkpoint).held(linear)
    place = held.place
    if held.unit.of_experts or held.stands_alone:
        return checkpoint.read(held.tensor)
    if held.unit.converter is not None:
        return place.of(_converted(checkpoint, held.unit)[place.path]).contiguous()
    if place.expert is None:
        return place.of(checkpoint.read(held.tensor)).contiguous()
    part = checkpoint.read_part(held.tensor, place.expert)
    return part.T.contiguous() if place.transposed else part


@lru_cache(maxsize=1)
def _converted(checkpoint: Checkpoint, unit: Unit) -> dict[str, torch.Tensor]:
    """The parameters that transformers makes of a unit's tensors: kept for the next linear of the same unit."""
    tensors = {name: checkpoint.read(name) for name in unit.all_tensors}
    return convert(unit, tensors, resolve(checkpoint).model)
