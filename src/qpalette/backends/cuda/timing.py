"""The one timing harness for kernels: launches in a CUDA graph, replayed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from qpalette.backends.cuda.graphs import capture_graph

COLD_BYTES = 230e6  # of different weights in rotation: several times the second-level cache of any GPU
LEAST_LAUNCHES = 60  # in a graph, so that starting it (some microseconds) does not count
REPEATS = 7


def graph_seconds(launches: Sequence[Callable[[], object]]) -> float:
    """Seconds of one launch: the median over replays of a graph that holds all of `launches`, over and over.

    Pass copies of a problem that together exceed the cache (`cold_copies`). Each launch must be safe to capture.
    """
    passes = max(1, -(-LEAST_LAUNCHES // len(launches)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates outside the capture
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    kept: list[object] = []  # results, whose memory a replay writes to
    graph = capture_graph(lambda: kept.extend(launch() for _ in range(passes) for launch in launches))
    seconds = []
    for _ in range(REPEATS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(kept))
    return statistics.median(seconds[1:])


def cold_copies(size_bytes: int) -> int:
    """How many copies of something of `size_bytes` keep it out of the cache."""
    return max(2, int(COLD_BYTES / max(1, size_bytes)) + 1)
