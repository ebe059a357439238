"""The one thread in which a model's requests run, several of them together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from qpalette.generation.batch import Batch, Job
from qpalette.generation.loop import Loop
from qpalette.generation.request import Request


@dataclass(frozen=True)
class _Alone:
    """Work during which no request is answered."""

    work: Callable[[], Any]
    future: Future[Any]


class Worker:
    """Does one thing after another in the order in which threads ask for it; requests of one sequence join the batch of
    up to `slots` that is being answered."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._waiting: deque[Job | _Alone] = deque()
        self._asked = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def is_current(self) -> bool:
        """Whether this is called from work that it does."""
        return threading.current_thread() is self._thread

    def answer(self, loop: Loop, request: Request) -> torch.Tensor:
        """As `Loop.run`. Waits for it."""
        if not request.continues:
            return self.alone(lambda: loop.run(request))
        return self._wait_for(Job(loop, request, Future()))

    def alone(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, done in the thread while no request is answered. Waits for it."""
        return self._wait_for(_Alone(work, Future()))

    def _wait_for(self, job: Job | _Alone) -> Any:
        with self._asked:
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="answer requests", daemon=True)
                self._thread.start()
            self._asked.notify()
        return job.future.result()

    def _run(self) -> None:
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._waiting)
            self._work_on(self._waiting[0])

    def _work_on(self, job: Job | _Alone) -> None:
        if isinstance(job, _Alone):
            self._waiting.popleft()
            try:
                job.future.set_result(job.work())
            except BaseException as error:
                job.future.set_exception(error)
            return
        device = job.request.ids.device
        with torch.inference_mode(False), torch.no_grad(), on(device):
            Batch(job.loop, self.slots, lambda: self._next_of(job.loop), lambda: self._may_join(job.loop)).run()

    def _may_join(self, loop: Loop) -> bool:
        """Whether the first that waits is a request of this loop; what is not keeps those behind it waiting."""
        first = self._waiting[0] if self._waiting else None
        return isinstance(first, Job) and first.loop is loop

    def _next_of(self, loop: Loop) -> Job | None:
        job = self._waiting.popleft() if self._may_join(loop) else None
        assert job is None or isinstance(job, Job)
        return job


def on(device: torch.device) -> Any:
    """What runs here uses this device, where it is CUDA's."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
