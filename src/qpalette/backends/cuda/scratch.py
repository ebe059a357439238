"""Memory between kernels that follow one another, and the order of those who start them."""

from __future__ import annotations

import threading

import torch

LEAST_BYTES = 1 << 20
# A launch's arguments are one block of memory, and so is what lies between a product's kernels.
ONE_AT_A_TIME = threading.Lock()
_scratches: dict[tuple[torch.device, int], torch.Tensor] = {}


def scratch(device: torch.device, stream: int, size: int) -> torch.Tensor:
    """`size` bytes or more that are the caller's until it has started its kernels: work on one stream is in order. What
    a graph is captured with has memory of its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.uint8, device=device)
    found = _scratches.get((device, stream))
    if found is None or len(found) < size:
        room = max(size, LEAST_BYTES)
        found = _scratches[device, stream] = torch.empty(room, dtype=torch.uint8, device=device)
    return found
