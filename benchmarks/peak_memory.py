"""The peak memory of a command and of every process that it starts, together."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import psutil

SECONDS = 0.05  # between two looks; a shorter peak is missed


def peak_memory(command: Sequence[str]) -> tuple[int, str]:
    """Bytes, and what the command printed. A page that several processes share counts once (PSS).

    Raises CalledProcessError when the command fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while True:
        peak = max(peak, _now(psutil.Process(process.pid)))
        try:
            printed, _ = process.communicate(timeout=SECONDS)
            break
        except subprocess.TimeoutExpired:
            pass
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed)
    return peak, printed


def _now(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass  # one has just ended: the next look sees the others
    return total
