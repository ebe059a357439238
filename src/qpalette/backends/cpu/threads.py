"""How many threads a kernel uses: as many as torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numba
import torch

# numba's default thread pool may not be entered twice at the same time, and a launch's arguments are memory of its own.
one_caller = threading.Lock()


def present_threads() -> int:
    return min(torch.get_num_threads(), _started_threads())


@contextmanager
def parallel_caller() -> Iterator[None]:
    """For one caller at a time: kernels that are parallel by themselves use `present_threads`."""
    threads = present_threads()
    with one_caller:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            yield
        finally:
            numba.set_num_threads(before)


@lru_cache(maxsize=1)
def _started_threads() -> int:
    """All that numba starts; it can use fewer, never more. Starting them sets the number of the OpenMP runtime, which
    is torch's, too."""
    asked = torch.get_num_threads()
    started = numba.get_num_threads()
    torch.set_num_threads(asked)
    return started
