"""Writes a safetensors file tensor by tensor: the header is known first, so nothing is held in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qpalette.storage.base import TensorInfo
from qpalette.storage.safetensors_format import DTYPE_NAMES

HEADER_ALIGNMENT = 8


class StreamingSafetensorsWriter:
    """Context manager: declare every tensor, then `write` each one once; the file appears only when complete.

    The bytes go to `path` + ".tmp", which is flushed to disk and renamed on a clean exit and removed after an
    exception. Inside the file wider dtypes come first, so that every tensor is aligned whatever the sizes.
    Write in the declared order where you can; any other order is correct too, it only seeks more.

    Raises ValueError when names repeat, a dtype has no safetensors name, a written tensor differs from its
    declaration or comes twice, or one is missing at the end.
    """

    def __init__(
        self, path: str | Path, infos: Iterable[TensorInfo], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        self._temporary = Path(f"{self.path}.tmp")
        declared = list(infos)
        self._missing = {info.name: info for info in declared}
        if len(self._missing) != len(declared):
            raise ValueError(f"{self.path}: a tensor name is declared twice")
        self._header, self._offsets = _header_and_offsets(declared, metadata or {})

    def __enter__(self) -> StreamingSafetensorsWriter:
        self._stream = open(self._temporary, "wb")
        self._stream.write(self._header)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store one declared tensor, from any device."""
        info = self._missing.get(name)
        if info is None:
            raise ValueError(f"{self.path}: tensor {name!r} was not declared, or is written twice")
        if tuple(tensor.shape) != tuple(info.shape) or tensor.dtype != info.dtype:
            raise ValueError(
                f"{self.path}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"declared {info.dtype} {tuple(info.shape)}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._stream.seek(self._offsets[name])
        self._stream.write(flat.view(torch.uint8).numpy().data)
        del self._missing[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                return
            if self._missing:
                raise ValueError(f"{self.path}: declared but never written: {', '.join(sorted(self._missing))}")
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._temporary, self.path)
        finally:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)


def header_bytes(infos: Iterable[TensorInfo], metadata: Mapping[str, str] | None = None) -> int:
    """Size of the file besides the tensors' own bytes."""
    return len(_header_and_offsets(list(infos), metadata or {})[0])


def _header_and_offsets(infos: list[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and each tensor's position from the start of the file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    position = 0
    for info in sorted(infos, key=lambda info: -info.dtype.itemsize):
        if info.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {info.name!r}: safetensors has no name for {info.dtype}")
        starts[info.name] = position
        end = position + info.nbytes
        header[info.name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data_start + start for name, start in starts.items()}
