"""The quantized model seen as a checkpoint, so that the exporter of plain models writes this one too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qpalette.formats.packed import QuantizationFormat
from qpalette.formats.parts import expected_tensors
from qpalette.formats.shares import stored_shares
from qpalette.models import tensors_of
from qpalette.models.multiplied import Shares
from qpalette.storage import Checkpoint, TensorInfo

PackedReader = Callable[[str, str], torch.Tensor]  # (linear name, suffix) -> tensor


class PackedCheckpoint(Checkpoint):
    """`source` with each linear's weight replaced by its packed tensors, at the same place in the order.

    `read_packed(linear, suffix)` supplies those; everything else is read from `source`, unchanged. What is put into
    `documents` (file name -> text) is written beside the tokenizer.
    """

    format = "safetensors"

    def __init__(
        self,
        source: Checkpoint,
        quantization: QuantizationFormat,
        read_packed: PackedReader,
    ) -> None:
        self.files = source.files
        self.config = {**source.config, "quantization_config": quantization.to_dict()}
        self.documents: dict[str, str] = {}
        self._source, self._read_packed = source, read_packed
        self._packed: dict[str, tuple[str, str]] = {}
        tensors: dict[str, TensorInfo] = {}
        self._records = records = quantization.records
        replaced: dict[str, list[str]] = {}  # tensor -> the linears in its place: all experts may share one
        for linear in records:
            first, *others = tensors_of(source, linear)
            replaced.setdefault(first, []).append(linear)
            replaced |= {other: [] for other in others}
        for info in source.tensors.values():
            if info.name not in replaced:
                tensors[info.name] = info
            for linear in replaced.get(info.name, []):
                for suffix, (dtype, shape) in expected_tensors(records[linear]).items():
                    name = f"{linear}.{suffix}"
                    tensors[name] = TensorInfo(name, shape, dtype)
                    self._packed[name] = (linear, suffix)
        self.tensors = tensors

    @property
    def carried(self) -> list[str]:
        """The tensors that are those of the source."""
        return [name for name in self.tensors if name not in self._packed]

    @property
    def shares(self) -> Shares:
        """How much of what multiplies is packed."""
        return stored_shares(self.config, self._records, self.tensors.values())

    @property
    def packed_bytes(self) -> int:
        """All parts of all linears."""
        return sum(self.tensors[name].nbytes for name in self._packed)

    def read(self, name: str) -> torch.Tensor:
        return self._read_packed(*self._packed[name]) if name in self._packed else self._source.read(name)

    def save_side_files(self, directory: Path) -> None:
        self._source.save_side_files(directory)
        for name, text in self.documents.items():
            (directory / name).write_text(text, encoding="utf-8", newline="\n")
