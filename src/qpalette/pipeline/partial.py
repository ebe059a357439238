"""Finished linears on disk, one small file each, so that a run can be killed at any moment and go on later."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qpalette.checkpoint import StreamingSafetensorsWriter, TensorInfo
from qpalette.core.errors import CheckpointError
from qpalette.pipeline.encode import EncodedLinear, Quality
from qpalette.pipeline.jobs import Job

logger = logging.getLogger(__name__)


class PartialResults:
    """A folder of finished linears, named by the digest of their job: another plan or source never meets them.

    A file appears by a rename after its bytes are on disk, so what is there is whole.
    """

    def __init__(self, directory: Path, jobs: Iterable[Job]) -> None:
        self.directory = directory
        self._jobs = {job.name: job for job in jobs}
        self._linears = directory / "linears"
        self.assembled = directory / "assembled"
        self.replaced = directory / "replaced"

    def open(self) -> None:
        """Make the folder, and drop what an interrupted run left half-written in it."""
        self._linears.mkdir(parents=True, exist_ok=True)
        for leftover in self._linears.glob("*.tmp"):
            leftover.unlink()
        for leftover in [self.assembled, *self.directory.glob(f".{self.assembled.name}.*")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def quality(self, job: Job) -> Quality | None:
        """The quality of a finished job; None when it is still to do."""
        file = self._file(job)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata() or {}
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s): %s is quantized again", file, error, job.name)
            return None
        if metadata.get("job") != job.digest:
            return None
        proxy = metadata.get("proxy")
        return Quality(float(metadata["distortion"]), None if proxy is None else float(proxy))

    def save(self, job: Job, encoded: EncodedLinear) -> None:
        tensors = {"qp_codes": encoded.codes, "qp_scales": encoded.scales, "qp_signs": encoded.signs}
        infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        metadata = {"job": job.digest, "linear": job.name}
        metadata |= {key: repr(value) for key, value in encoded.quality._asdict().items() if value is not None}
        with StreamingSafetensorsWriter(self._file(job), infos, metadata) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    def read(self, linear: str, suffix: str) -> torch.Tensor:
        """One tensor of a finished linear."""
        file = self._file(self._jobs[linear])
        try:
            with safe_open(file, "pt") as stored:
                return stored.get_tensor(suffix)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); remove it and run again") from error

    def remove(self) -> None:
        """After the output is in place."""
        shutil.rmtree(self.directory)

    def _file(self, job: Job) -> Path:
        return self._linears / f"{job.digest[:40]}.safetensors"
