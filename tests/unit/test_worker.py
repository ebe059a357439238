"""The thread that answers requests outlives whatever goes wrong before, in and after a batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qpalette.generation import worker
from qpalette.generation.worker import Worker


class Failing:
    """A batch that takes its first request and then fails, told the request of it or not."""

    def __init__(self, tells: bool) -> None:
        self.tells = tells

    def __call__(self, loop: Any, slots: int, next_job: Any, may_join: Any) -> Failing:
        self.next_job = next_job
        return self

    def run(self) -> None:
        job = self.next_job()
        if self.tells:
            job.future.set_exception(ValueError("of the request"))
        raise RuntimeError("of the batch")


REQUEST: Any = SimpleNamespace(continues=True, ids=torch.zeros(1, 1))


@pytest.mark.parametrize(("tells", "error"), [(False, "of the batch"), (True, "of the request")])
def test_a_batch_that_fails_leaves_the_thread_to_others(
    monkeypatch: pytest.MonkeyPatch, tells: bool, error: str
) -> None:
    monkeypatch.setattr(worker, "Batch", Failing(tells))
    answering = Worker(2)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=error):
            answering.answer(SimpleNamespace(), REQUEST)  # type: ignore[arg-type]
    assert answering.alone(lambda has_left: 3) == 3


def test_what_fails_ahead_of_a_batch_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(device: torch.device) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(worker, "decoding_on", refusing)
    answering = Worker(2)
    with pytest.raises(RuntimeError, match="no such device"):
        answering.answer(SimpleNamespace(), REQUEST)  # type: ignore[arg-type]
    assert answering.alone(lambda has_left: 3) == 3


def test_work_is_told_that_its_caller_was_interrupted() -> None:
    """Of any kind: whoever waits is interrupted while the thread is at it, and that need not go on."""
    begun, ended = threading.Event(), threading.Event()
    patience = 60

    def work(has_left: Callable[[], bool]) -> None:
        begun.set()
        deadline = time.monotonic() + patience
        while not has_left() and time.monotonic() < deadline:
            time.sleep(0.001)
        if has_left():
            ended.set()

    class Interrupted(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> Any:
            begun.wait(patience)
            raise KeyboardInterrupt

    answering = Worker(2)
    with pytest.raises(KeyboardInterrupt):
        answering._wait_for(worker._Alone(work, Interrupted()))
    assert ended.wait(patience)
