"""Finished linears on disk, one small file each, so that a run can be killed at any moment and go on later."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qpalette.core.errors import CheckpointError
from qpalette.core.files import write_whole
from qpalette.formats import parts_of
from qpalette.models import read_weight
from qpalette.pipeline.encode import EncodedLinear, Quality
from qpalette.pipeline.jobs import Job
from qpalette.storage import Checkpoint, StreamingSafetensorsWriter, TensorInfo

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 24  # hashed by one thread


class PartialResults:
    """A folder of finished linears, named by the digest of their job: another plan or source never meets them.

    A file appears by a rename after its bytes are on disk, so what is there is whole; its digest tells of bits that the
    disk has lost since. A job's digest knows samples of the source alone. So when the source's files have another
    size or time than in the run before, the weights that finished linears were made from are compared as well. One run
    at a time may use it (`Output.claimed`).
    """

    def __init__(self, directory: Path, jobs: Iterable[Job]) -> None:
        self.directory = directory
        self._jobs = {job.name: job for job in jobs}
        self._linears = directory / "linears"
        self._stamps = self._linears / "source.json"
        self._found: dict[str, Quality] = {}
        self._at_hand = _AtHand()
        self.assembled = directory / "assembled"

    def open(self, checkpoint: Checkpoint) -> None:
        """Make the folder, drop what an interrupted run left half-written in it, and see which linears are finished."""
        self._linears.mkdir(parents=True, exist_ok=True)
        for leftover in self._linears.glob("*.tmp"):
            leftover.unlink()
        for leftover in [self.assembled, *self.directory.glob(f".{self.assembled.name}.*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        changed = self._stamps.exists() and self._stamps.read_text(encoding="utf-8") != _stamps_of(checkpoint)
        if changed:
            logger.warning("the source's files changed since the last run: finished linears are compared with them")
        for job in self._jobs.values():
            quality = self._load(job, checkpoint if changed else None)
            if quality is not None:
                self._found[job.name] = quality
        write_whole(self._stamps, _stamps_of(checkpoint))

    def quality(self, job: Job) -> Quality | None:
        """The quality of a finished job; None when it is still to do."""
        return self._found.get(job.name)

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError when the source's files have changed since `open`."""
        if self._stamps.read_text(encoding="utf-8") != _stamps_of(checkpoint):
            raise CheckpointError(
                "the source's files changed while they were read; run the same command again: finished linears are "
                "compared with the source, and those that differ are quantized again"
            )

    def save(self, job: Job, encoded: EncodedLinear) -> None:
        tensors = {part.suffix: getattr(encoded, part.field) for part in parts_of(job.record)}
        infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        metadata = {"job": job.digest, "linear": job.name, "weight": encoded.weight_digest}
        metadata |= {"quality": json.dumps(encoded.quality)}
        metadata |= {"digest": _digest(tensors, metadata)}
        with StreamingSafetensorsWriter(self._file(job), infos, metadata) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        self._found[job.name] = encoded.quality

    def read(self, linear: str, suffix: str) -> torch.Tensor:
        """One tensor of a finished linear, the bytes that were saved.

        A thread asks for a linear's tensors one after the other: all are read and compared at once, and kept until
        it asks for another linear's.
        Raises CheckpointError naming the linear when its file cannot be read, or has lost a bit.
        """
        if self._at_hand.linear != linear:
            self._at_hand.tensors = self._verified(linear)
            self._at_hand.linear = linear
        return self._at_hand.tensors[suffix]

    def remove(self) -> None:
        """After the output is in place."""
        for folder in (self._linears, self.assembled):
            shutil.rmtree(folder, ignore_errors=True)

    def _verified(self, linear: str) -> dict[str, torch.Tensor]:
        job = self._jobs[linear]
        file = self._file(job)
        way_out = f"run the same command again: {linear} alone is quantized again"
        try:
            tensors, metadata = _stored(file, job)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); {way_out}") from error
        if metadata.get("digest") != _digest(tensors, metadata):
            raise CheckpointError(f"{file} has lost a bit since it was written (its digest differs); {way_out}")
        return tensors

    def _load(self, job: Job, changed: Checkpoint | None) -> Quality | None:
        """What is stored of a job; None when nothing is, it is damaged, or the source has `changed` under it."""
        file = self._file(job)
        if not file.exists():
            return None
        try:
            tensors, metadata = _stored(file, job)
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s): %s is quantized again", file, error, job.name)
            return None
        if metadata.get("job") != job.digest:
            return None
        if metadata.get("digest") != _digest(tensors, metadata):
            logger.warning("%s is damaged (its digest differs): %s is quantized again", file, job.name)
            return None
        if changed is not None and metadata.get("weight") != digest_of(read_weight(changed, job.name)):
            logger.warning("%s has changed: it is quantized again", job.name)
            return None
        return Quality(*json.loads(metadata["quality"]))

    def _file(self, job: Job) -> Path:
        return self._linears / f"{job.digest[:40]}.safetensors"


class _AtHand(threading.local):
    """What was read last, by each thread."""

    linear = ""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}


def _stored(file: Path, job: Job) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a job's file, in the order in which they are hashed, and its metadata."""
    with safe_open(file, "pt") as stored:
        tensors = {part.suffix: stored.get_tensor(part.suffix) for part in parts_of(job.record)}
        return tensors, stored.metadata() or {}


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Of all that the output takes from a file."""
    return hashlib.sha256(f"{digest_of(*tensors.values())} {metadata.get('quality')}".encode()).hexdigest()


def digest_of(*tensors: torch.Tensor) -> str:
    """SHA-256 of the SHA-256s of blocks of BLOCK_BYTES of some CPU tensors, so that threads share a large one."""
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]
    blocks = (view[start : start + BLOCK_BYTES] for view in flat for start in range(0, len(view), BLOCK_BYTES))
    with ThreadPoolExecutor() as pool:  # its own: a forked process has its parent's pools, without their threads
        return hashlib.sha256(b"".join(pool.map(_sha256, blocks))).hexdigest()


def _sha256(block: memoryview) -> bytes:
    return hashlib.sha256(block).digest()


def _stamps_of(checkpoint: Checkpoint) -> str:
    """Sizes and times of change of the source's files."""
    stats = {file.name: file.stat() for file in checkpoint.files}
    return json.dumps({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()})
