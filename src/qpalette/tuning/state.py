"""Where a run is, on disk: killed at any moment, it goes on from there to the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qpalette.storage import StreamingSafetensorsWriter, TensorInfo

TENSORS = ("factors", "best", "mean", "square")


@dataclass
class State:
    """After `step` steps: the factors, Adam's two moments, and the best factors so far. All float32 [n].

    `looks` are (step, KL on the held-out windows, nats per token), the first of them at the start.
    """

    factors: Tensor
    best: Tensor
    mean: Tensor
    square: Tensor
    step: int = 0
    looks: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def start(cls, size: int, device: torch.device) -> State:
        factors, best, mean, square = (torch.zeros(size, device=device) for _ in TENSORS)
        return cls(factors, best, mean, square)

    @property
    def best_look(self) -> tuple[int, float]:
        """(step, KL) of the least KL, the earliest of equals; what is not a number is never the least."""
        return min(self.looks, key=lambda look: (math.inf if math.isnan(look[1]) else look[1], look[0]))

    @property
    def looks_since_best(self) -> int:
        return len(self.looks) - 1 - self.looks.index(self.best_look)

    def save(self, file: Path, identity: str) -> None:
        """The whole of it or nothing. Another `identity` never meets it."""
        tensors = {name: getattr(self, name).cpu() for name in TENSORS}
        infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        metadata = {"identity": identity, "step": str(self.step), "looks": json.dumps(self.looks)}
        metadata["sha256"] = _sha256(tensors, metadata)
        with StreamingSafetensorsWriter(file, infos, metadata) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    @classmethod
    def load(cls, file: Path, identity: str, device: torch.device) -> State | None:
        """What was saved; None when nothing was, it is another run's, or it is damaged: then all begins anew."""
        try:
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in TENSORS}
        except (SafetensorError, OSError):
            return None
        if metadata.get("identity") != identity or metadata.get("sha256") != _sha256(tensors, metadata):
            return None
        looks = [(int(step), float(kl)) for step, kl in json.loads(metadata["looks"])]
        factors, best, mean, square = (tensors[name].to(device) for name in TENSORS)
        return cls(factors, best, mean, square, int(metadata["step"]), looks)


def _sha256(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([metadata.get(key) for key in ("identity", "step", "looks")]).encode())
    for name in TENSORS:
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
