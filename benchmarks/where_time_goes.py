"""Where the seconds of a step go on a GPU: busy time against the wall, longest kernels, functions of the host."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LONGEST = 12


def profiled(what: str, run: Callable[[], Any]) -> Any:
    """What `run` returns; a table is printed. The host's functions are those of its main thread: backward passes on a
    GPU have their own. On a CPU they are all there is."""
    host, start = cProfile.Profile(), time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]) as device:
        found = host.runcall(run)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    wall = time.perf_counter() - start
    kernels = [event for event in device.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    print(f"\n{what}: {wall:.1f} s with the profiler on, GPU busy {busy:.1f} s ({busy / wall:.0%})", flush=True)
    for event in kernels[:LONGEST]:
        print(f"{event.self_device_time_total / 1e6:9.2f} s {event.count:8d} x  {event.key[:100]}")
    pstats.Stats(host).sort_stats("tottime").print_stats(LONGEST)
    pstats.Stats(host).sort_stats("cumtime").print_stats("qpalette", 2 * LONGEST)
    return found
