"""CUDA graphs: work recorded once, and started again as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CAPTURE_WARMUP = 3  # runs ahead of a capture, as torch's documentation of CUDA graphs asks for

# work, which has run before -> something whose replay() does it again; None: not yet, it is asked again. It leaves what
# `work` would.
Capture = Callable[[Callable[[], None]], Any]


def capture_graph(work: Callable[[], None], pool: torch.cuda.MemPool | None = None) -> Any:
    """A CUDA graph of `work`, which does not run; it has run before, and reads and writes memory that stays.

    Another thread may use the device meanwhile. `pool`: graphs that share one must not rely on each other's memory.
    """
    before = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    place: Any = None if pool is None else pool.id
    try:
        with torch.cuda.graph(graph, pool=place, capture_error_mode="thread_local"):
            work()
    except BaseException:
        torch.cuda.set_stream(before)  # torch stays on its own where a capture fails
        _leave_capture()
        raise
    return graph


def _leave_capture() -> None:
    """After a capture that failed torch's random generators believe that it goes on, and the next draw in the process
    raises. A capture that succeeds, of anything, tells them that it is over."""
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
