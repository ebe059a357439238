"""A quantized model with other values of some tensors: what tuning writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qpalette.core.records import LinearRecord
from qpalette.formats.dequantized import OWN_FILES
from qpalette.formats.packed import QuantizationFormat
from qpalette.formats.parts import is_part, parts_of
from qpalette.formats.reader import Artifact
from qpalette.storage import Checkpoint, TensorInfo, copy_side_files
from qpalette.storage.base import layout_of


class RevisedCheckpoint(Checkpoint):
    """`artifact` with the values of `revised` (name -> stored tensor), and `records` of the same linears.

    A part that a record has no more, such as signs where a diagonal came, is left out. `provenance` is added to the
    artifact's. What is put into `documents` (file name -> text) is written beside the tokenizer.
    """

    format = "safetensors"

    def __init__(
        self,
        artifact: Artifact,
        records: Mapping[str, LinearRecord],
        revised: Mapping[str, torch.Tensor],
        provenance: Mapping[str, str],
    ) -> None:
        origin = {**artifact.format.provenance, **provenance}
        quantization = QuantizationFormat.of(records, origin, artifact.format.modules_to_not_convert)
        self.artifact, self.revised = artifact, revised
        self.files = tuple(sorted({stored.file for stored in artifact.stored.values()}))
        self.config = {**artifact.config, "quantization_config": quantization.to_dict()}
        self.documents: dict[str, str] = {}
        self._packed = {f"{name}.{part.suffix}" for name, record in records.items() for part in parts_of(record)}
        kept = [name for name in artifact.stored if not is_part(name) or name in self._packed]
        infos = {name: artifact.stored[name].info for name in kept}
        infos |= {name: TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in revised.items()}
        self.tensors = layout_of(infos.values())

    @property
    def carried_bytes(self) -> int:
        """Of everything but the linears."""
        return sum(info.nbytes for info in self.tensors.values() if info.name not in self._packed)

    def read(self, name: str) -> torch.Tensor:
        return self.revised[name] if name in self.revised else self.artifact.read(name)

    def save_side_files(self, directory: Path) -> None:
        copy_side_files(self.artifact.directory, directory, but=OWN_FILES)
        for name, text in self.documents.items():
            (directory / name).write_text(text, encoding="utf-8", newline="\n")
