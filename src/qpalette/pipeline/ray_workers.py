"""Batches of jobs over the hosts of a Ray cluster. Ray starts a batch again when its worker or host dies.

The hosts need the same release and the model at the same path; results travel through Ray to the host that asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qpalette.core.errors import InputError, QPaletteError
from qpalette.core.text import first_line
from qpalette.pipeline.work import Work, encode_batch, read_sources
from qpalette.pipeline.workers import Batch, Result, from_plain, to_plain

LOCAL = "local"  # in place of an address: a cluster of this host alone, for as long as the run
RETRIES = 3


@contextmanager
def connected(address: str, workers: int) -> Iterator[None]:
    """A cluster for `run_in_ray`. Raises InputError when Ray is not installed, or not reached at `address`."""
    ray = _ray()
    try:
        ray.init(
            address=None if address == LOCAL else address,
            num_cpus=workers if address == LOCAL else None,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"there is no Ray cluster at '{address}' ({first_line(error)}); give its address, or {LOCAL}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run_in_ray(work: Work, batches: Sequence[Batch], workers: int, device: torch.device) -> Iterator[Result]:
    """Each batch with its packed tensors, as they are finished, in the cluster that is `connected`; `workers` batches
    at a time.

    With a device "cuda" each batch has one GPU. Raises what `encode_batch` raises, and InputError when Ray loses a
    batch too often.
    """
    ray = _ray()
    task = ray.remote(max_retries=RETRIES, num_cpus=1, num_gpus=int(device.type == "cuda"))(_encode)
    waiting = list(reversed(batches))
    running: dict[Any, Batch] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            batch = waiting.pop()
            running[task.remote(work, batch, str(device))] = batch
        (done,), _ = ray.wait(list(running), num_returns=1)
        batch = running.pop(done)
        yield batch, [from_plain(values) for values in _get(ray, done, batch)]


def _encode(work: Work, batch: Batch, device: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1 if work.hessians is None else work.threads)  # Ray reserved one CPU
    sources = read_sources(work.open(), batch)
    return [to_plain(encoded) for encoded in encode_batch(work, batch, sources, torch.device(device))]


def _get(ray: Any, reference: Any, batch: Batch) -> list[dict[str, Any]]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, QPaletteError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"Ray lost {batch[0].name} {RETRIES + 1} times ({first_line(error)}); run the same command "
            "again: finished linears are kept"
        ) from error


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InputError("Ray is not installed; run `pip install qpalette[ray]`") from error
    return ray
