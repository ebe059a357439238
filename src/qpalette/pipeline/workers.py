"""Batches of jobs over several processes of one host. Batches are independent, so that any number gives the same bytes.

Each process has a device of its own where there are several. A process that dies takes nothing along: its batch goes to
another one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from qpalette.core.errors import InputError
from qpalette.pipeline.encode import EncodedLinear
from qpalette.pipeline.jobs import Job
from qpalette.pipeline.work import Work, encode_batch, read_sources

logger = logging.getLogger(__name__)

QUEUED = 2  # batches for each worker: one to encode, one at hand when it is done
DEATHS_IN_A_ROW = 3  # without any batch finished in between: then it is not bad luck

Batch = tuple[Job, ...]
Result = tuple[Batch, list[EncodedLinear]]


def run_in_processes(work: Work, batches: Sequence[Batch], workers: int, device: torch.device) -> Iterator[Result]:
    """Each batch with its packed tensors, as they are finished; results wait for no more than a few batches at a time.

    A device "cuda" without a number means all of them. Raises what `encode_batch` raises, and InputError when
    processes keep dying.
    """
    todo, deaths = deque(batches), 0
    while todo:
        running: dict[Future[list[dict[str, Any]]], Batch] = {}
        with _Pool(work, workers, device) as pool:
            try:
                while todo or running:
                    while todo and len(running) < QUEUED * workers:
                        future = pool.submit(_encode, todo[0])
                        running[future] = todo.popleft()
                    future = wait(running, return_when=FIRST_COMPLETED).done.pop()
                    result = _result(future)
                    yield running.pop(future), result
                    deaths = 0
            except BrokenProcessPool as error:
                todo.extendleft(reversed(running.values()))
                deaths += 1
                if deaths == DEATHS_IN_A_ROW:
                    raise InputError(
                        f"{deaths} workers died in a row, with {todo[0][0].name} among their tasks (killed for "
                        "memory?); use fewer workers, and run the same command: finished linears are kept"
                    ) from error
                logger.warning("a worker died; its linears go to others (%d batches are left)", len(todo))


class _Pool(ProcessPoolExecutor):
    """Fresh processes, which end with this one; leaving early does not wait for what they are doing."""

    def __init__(self, work: Work, workers: int, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA and the compilers' threads do not survive a fork
        devices = context.SimpleQueue()
        for index in range(workers):
            devices.put(device_of_worker(device, index))
        threads = max(1, work.threads // workers) if work.hessians is None else work.threads
        super().__init__(workers, context, _start, (work, devices, threads))

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            for process in list((self._processes or {}).values()):
                process.kill()
        self.shutdown(wait=True, cancel_futures=True)


def device_of_worker(device: torch.device, index: int) -> str:
    """ "cuda" is shared out; any other device is everybody's."""
    if device.type == "cuda" and device.index is None:
        return f"cuda:{index % torch.cuda.device_count()}"
    return str(device)


_here: dict[str, Any] = {}


def _start(work: Work, devices: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _here.update(work=work, checkpoint=work.open(), device=torch.device(devices.get()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by a pool"
    parent.join()  # however it ends, and where a process keeps the number of a dead parent, too
    os._exit(1)


def _encode(batch: Batch) -> list[dict[str, Any]]:
    sources = read_sources(_here["checkpoint"], batch)
    return [to_plain(e) for e in encode_batch(_here["work"], batch, sources, _here["device"])]


def _result(future: Future[list[dict[str, Any]]]) -> list[EncodedLinear]:
    return [from_plain(values) for values in future.result()]


def to_plain(encoded: EncodedLinear) -> dict[str, Any]:
    """numpy arrays in place of tensors, which torch would send through shared memory that dies with its owner."""
    values = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def from_plain(values: dict[str, Any]) -> EncodedLinear:
    """Inverse of `to_plain`; the arrays are copied, since Ray's cannot be written to."""
    plain: dict[str, Any] = {n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in values.items()}
    return EncodedLinear(**plain)
