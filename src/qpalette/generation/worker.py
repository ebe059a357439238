"""The one thread in which a model's requests run, several of them together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from qpalette.generation.batch import Batch, Job
from qpalette.generation.loop import Loop
from qpalette.generation.request import Request


@dataclass(frozen=True)
class _Alone:
    """Work during which no request is answered. `left` is set where nobody waits for it any more; the work is given
    what tells so, and may end with it."""

    work: Callable[[Callable[[], bool]], Any]
    future: Future[Any] = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)


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
            return self.alone(lambda has_left: _run(loop, request, has_left))
        return self._wait_for(Job(loop, request))

    def alone(self, work: Callable[[Callable[[], bool]], Any]) -> Any:
        """What `work` returns, done in the thread while no request is answered. Waits for it. `work` is given a
        function that says whether the caller has been interrupted, so that it need not go on."""
        return self._wait_for(_Alone(work))

    def _wait_for(self, job: Job | _Alone) -> Any:
        with self._asked:
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="answer requests", daemon=True)
                self._thread.start()
            self._asked.notify()
        try:
            return job.future.result()
        except BaseException:
            job.left.set()  # who waited was interrupted: what nobody waits for ends at its next token
            raise

    def _run(self) -> None:
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._waiting)
            job = self._waiting[0]
            try:
                self._work_on(job)
            except BaseException as error:  # not of the work itself: the thread stays for those who wait
                self._give_up(job, error)

    def _give_up(self, job: Job | _Alone, error: BaseException) -> None:
        if self._waiting and self._waiting[0] is job:
            self._waiting.popleft()
        if not job.future.done():
            job.future.set_exception(error)

    def _work_on(self, job: Job | _Alone) -> None:
        if isinstance(job, _Alone):
            self._waiting.popleft()
            if job.left.is_set():
                return
            try:
                job.future.set_result(job.work(job.left.is_set))
            except BaseException as error:
                job.future.set_exception(error)
            return
        with decoding_on(job.request.ids.device):
            Batch(job.loop, self.slots, lambda: self._next_of(job.loop), lambda: self._may_join(job.loop)).run()

    def _may_join(self, loop: Loop) -> bool:
        """Whether the first that waits is a request of this loop; what is not keeps those behind it waiting."""
        first = self._waiting[0] if self._waiting else None
        return isinstance(first, Job) and first.loop is loop

    def _next_of(self, loop: Loop) -> Job | None:
        job = self._waiting.popleft() if self._may_join(loop) else None
        assert job is None or isinstance(job, Job)
        return job


def _run(loop: Loop, request: Request, has_left: Callable[[], bool]) -> torch.Tensor:
    with decoding_on(request.ids.device):
        return loop.run(request, has_left)


@contextmanager
def decoding_on(device: torch.device) -> Iterator[None]:
    """What a loop runs in, in each thread anew. No inference mode: its tensors would have no version, by which launches
    are joined, and a cache made there could not be written to elsewhere."""
    cuda = torch.cuda.device(device if device.type == "cuda" else -1)
    with torch.inference_mode(False), torch.no_grad(), cuda:
        yield
