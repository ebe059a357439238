"""What a source model is to the rest of the package: named tensors read one by one, a config, a tokenizer."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import CheckpointError

SAMPLE_BYTES = 4096
SAMPLES_PER_FILE = 64


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as `Checkpoint.read` returns it, known from the file headers alone."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(ABC):
    """A source model on disk. Opening one reads headers; only `read` touches weights, one tensor at a time."""

    format: str  # "safetensors", which transformers reads as it is; "gguf", or one of `storage/quantized`, decoded
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]  # every tensor, in file order
    config: dict[str, Any]  # the content of a Hugging Face config.json

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """A fresh CPU tensor of the shape and dtype of `tensors[name]`, owning its memory.

        Raises CheckpointError when there is no such tensor or its bytes cannot be read.
        """

    def read_part(self, name: str, index: int) -> torch.Tensor:
        """`read(name)[index]`, without the rest where the format allows it."""
        return self.read(name)[index].clone()

    def check_values(self, carried: Iterable[str]) -> None:
        """Read the tensors `carried`, and what others are decoded by.

        Raises CheckpointError naming the first that cannot be right: NaN or infinity in it, zero points out of range.
        """
        for name in carried:
            if self.tensors[name].dtype.is_floating_point and not torch.isfinite(self.read(name)).all():
                raise CheckpointError(
                    f"{self.location}: tensor {name!r} has values that are not finite (NaN or infinity); the model "
                    "answers with them: fetch the file again"
                )

    @abstractmethod
    def save_side_files(self, directory: Path) -> None:
        """Write tokenizer, chat template and generation config into an existing directory.

        Never weights, never code, never config.json.
        """

    @cached_property
    def side_files(self) -> Mapping[str, int]:
        """Bytes of each file of `save_side_files`, by its name in the directory. They are written once to be counted: a
        tokenizer is made of a GGUF file's metadata, and other tools' files lose what would run."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_side_files(Path(folder))
            files = [file for file in Path(folder).rglob("*") if file.is_file()]
            return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}

    @property
    def location(self) -> Path:
        """What `open_checkpoint` takes to open the same model again."""
        return self.files[0] if self.format == "gguf" else self.files[0].parent

    @property
    def total_bytes(self) -> int:
        """Size of all tensors as `read` returns them."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """Stable hash of config, headers, file sizes and a sample of each file; a copy of the folder keeps it."""
        headers = [[info.name, list(info.shape), str(info.dtype)] for info in self.tensors.values()]
        digest = hashlib.sha256(json.dumps([self.format, self.config, headers], sort_keys=True).encode())
        for file in self.files:
            digest.update(_sample_digest(file))
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for a person: what kind of model this is and how large."""
        model_type = self.config.get("model_type", "unknown architecture")
        return (
            f"{model_type}, {self.format} in {len(self.files)} file(s), "
            f"{len(self.tensors)} tensors, {self.total_bytes / 1e6:.1f} MB"
        )


def layout_of(infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """The infos keyed by name, order kept."""
    return {info.name: info for info in infos}


def _sample_digest(file: Path) -> bytes:
    """Hash of a file's size and of evenly spaced blocks, its first and last ones included."""
    size = file.stat().st_size
    last = max(0, size - SAMPLE_BYTES)
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        for i in range(SAMPLES_PER_FILE):
            stream.seek(last * i // (SAMPLES_PER_FILE - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()
