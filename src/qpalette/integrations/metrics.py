"""What Prometheus reads of a server's requests."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CLIENT_LEFT = 499  # as nginx counts it
DEVICE_BYTES = "qpalette_device_bytes"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

Send = Callable[[Any], Awaitable[None]]


class Metrics:
    """Counts of one server. Labels are paths that it has, and statuses: bounded, whatever clients send."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._running = Gauge("qpalette_running", "Requests that wait or are being answered.", registry=self.registry)
        self._ended = Counter(
            "qpalette_requests", "Requests by status; 499: its client left.", ["path", "status"], registry=self.registry
        )
        self._first = self._seconds("qpalette_first_part_seconds", "Until the first part of an answer's body.")
        self._whole = self._seconds("qpalette_answer_seconds", "Until the end of an answer.")
        if torch.cuda.is_available():
            taken = Gauge(DEVICE_BYTES, "Memory that torch has taken of the GPUs.", registry=self.registry)
            taken.set_function(lambda: sum(map(torch.cuda.memory_reserved, range(torch.cuda.device_count()))))

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, ["path"], registry=self.registry, buckets=SECONDS)

    def page(self) -> PlainTextResponse:
        return PlainTextResponse(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    @contextmanager
    def watching(self, path: str, send: Send) -> Iterator[Send]:
        """What a request is to be answered by, an ASGI `send`, in the place of this one."""
        start, status, has_begun, has_ended = time.perf_counter(), CLIENT_LEFT, False, False

        async def watched(message: Any) -> None:
            nonlocal status, has_begun, has_ended
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
                return
            has_ended = not message.get("more_body", False)
            if message.get("body") and not has_begun:
                has_begun = True
                self._first.labels(path).observe(time.perf_counter() - start)

        self._running.inc()
        try:
            yield watched
        finally:
            self._running.dec()
            self._ended.labels(path, status if has_ended else CLIENT_LEFT).inc()
            self._whole.labels(path).observe(time.perf_counter() - start)
