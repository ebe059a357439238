"""What long work says of itself: a large model is built and compiled for minutes before its first figure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

PATIENCE = 2.0  # seconds that a stage takes before it is told of
Stages = Callable[[str], AbstractContextManager[None]]  # what is being done -> around the work


def silent(doing: str) -> AbstractContextManager[None]:
    return nullcontext()


def stages(tell: Callable[[str], None], patience: float = PATIENCE) -> Stages:
    """Each stage that takes long is told of while it goes on, and with its seconds when it is done."""

    @contextmanager
    def stage(doing: str) -> Iterator[None]:
        start = time.perf_counter()
        timer = threading.Timer(patience, tell, [f"{doing} ..."])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        seconds = time.perf_counter() - start
        if seconds >= patience:
            tell(f"{doing}: {seconds:.1f} s")

    return stage
