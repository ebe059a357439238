"""What a damaged file may cost whoever reads it: memory in proportion to its bytes, and an end."""

from __future__ import annotations

import re
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Reading holds a file's bytes, their JSON (some hundred bytes for each of a small number or key) and a decoded copy;
# gguf makes objects of 700 bytes for each item of an array, and is called twice.
BYTES_PER_BYTE = {"safetensors": 400, "gguf": 1500}
TRACED_AT_LEAST = 96 << 20  # of what Python and numpy allocate: a class is imported, and built with 1000 layers at most
TOUCHED_AT_LEAST = 192 << 20  # of the process: modules that are loaded, threads, what allocators keep
HANGS = 120  # seconds: thousands of times what a case takes
SEES_EVERYTHING = sys.platform == "linux"  # elsewhere what Python and numpy allocate, alone


class StillBusy(BaseException):
    """No Exception: what reads a file may turn any of those into a refusal."""


@contextmanager
def bounded(size: int, format: str = "safetensors") -> Iterator[None]:
    """Raises AssertionError when the body needs more memory than a file of `size` bytes justifies, and StillBusy when
    it does not end.

    Two measures: Python's own, exact for Python and numpy and blind to torch; and the most memory that the process had
    in use, which nothing escapes. Start tracemalloc before.
    """
    allowed = BYTES_PER_BYTE[format] * size
    tracemalloc.reset_peak()
    traced, touched = tracemalloc.get_traced_memory()[0], _in_use_from_now()
    with _ends():
        yield
    traced = tracemalloc.get_traced_memory()[1] - traced
    assert traced <= TRACED_AT_LEAST + allowed, f"{traced} bytes allocated for {size} on disk"
    touched = _most_in_use() - touched
    assert touched <= TOUCHED_AT_LEAST + allowed, f"{touched} bytes of memory for {size} on disk"


@contextmanager
def traced() -> Iterator[None]:
    """tracemalloc, on for the body."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@contextmanager
def _ends() -> Iterator[None]:
    def give_up(*call: Any) -> None:
        raise StillBusy(f"still busy after {HANGS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _in_use_from_now() -> int:
    """Bytes in use, which is the most from now on."""
    if not SEES_EVERYTHING:
        return 0
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc(5)
    return _most_in_use()


def _most_in_use() -> int:
    if not SEES_EVERYTHING:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10
