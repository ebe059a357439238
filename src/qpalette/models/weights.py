"""The weight of a linear in a checkpoint: a tensor of its own, or a part of one that stacks all experts."""

from __future__ import annotations

import torch

from qpalette.core.records import LinearShape
from qpalette.models.model_class import EXPERT, stored_transposed
from qpalette.storage import Checkpoint


def tensor_of(checkpoint: Checkpoint, linear: str) -> str:
    """The name of the tensor that holds the weight of a linear: its own, or one that stacks all experts."""
    match = EXPERT.fullmatch(linear)
    stacked = f"{match['experts']}.{match['leaf']}" if match else ""
    return stacked if stacked in checkpoint.tensors else f"{linear}.weight"


def weight_bytes(checkpoint: Checkpoint, linear: LinearShape) -> int:
    """What the weight of a linear takes on disk."""
    return linear.weights * checkpoint.tensors[tensor_of(checkpoint, linear.name)].dtype.itemsize


def read_weight(checkpoint: Checkpoint, linear: str) -> torch.Tensor:
    """The weight of a linear, [out_features, in_features]. Raises CheckpointError as `Checkpoint.read` does."""
    tensor, match = tensor_of(checkpoint, linear), EXPERT.fullmatch(linear)
    if tensor == f"{linear}.weight" or match is None:
        return checkpoint.read(tensor)
    part = checkpoint.read_part(tensor, int(match["index"]))
    return part.T.contiguous() if stored_transposed(checkpoint.config, linear) else part
