"""Tokens on their way from the device to the host."""

from __future__ import annotations

from typing import Any

import torch


class Reader:
    """Reads one step's tokens while the next step runs: two of them may be under way."""

    def __init__(self, batch: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.slots = [torch.empty(batch, dtype=torch.int64, pin_memory=cuda) for _ in range(2)]
        self.sent: list[Any] = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self.sends = self.reads = 0

    def send(self, token: torch.Tensor) -> None:
        """token: int64 [batch, 1] on the device; it may be written over by later work there."""
        place = self.sends % 2
        self.slots[place].copy_(token[:, 0], non_blocking=True)
        if self.sent:
            self.sent[place].record()
        self.sends += 1

    def read(self) -> torch.Tensor:
        """int64 [batch]: the tokens that were sent first and not read yet. Waits for them."""
        place = self.reads % 2
        if self.sent:
            self.sent[place].synchronize()
        self.reads += 1
        return self.slots[place].clone()
