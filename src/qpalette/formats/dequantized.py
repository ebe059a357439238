"""A quantized model seen as an ordinary checkpoint: its weights decoded one by one, for tools that know no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from qpalette.core.errors import ArtifactError
from qpalette.core.records import TILE, LinearRecord
from qpalette.formats.parts import is_part
from qpalette.formats.reader import Artifact
from qpalette.models.experts import EXPERT
from qpalette.models.model_class import model_of
from qpalette.models.sources import Sources
from qpalette.rotate import Rotation, diagonal_of, unrotate_weight
from qpalette.runtime import PackedLinear, select
from qpalette.storage import Checkpoint, TensorInfo, copy_side_files

CHUNK_WEIGHTS = 1 << 24  # decoded at a time, in whole tile rows: it bounds the float32 temporaries
OWN_FILES = ("qpalette_report.json",)


class DequantizedCheckpoint(Checkpoint):
    """`artifact` with the packed tensors of each linear replaced by its weight, rounded once to `dtype`.

    Names, order of dimensions and stacks of experts are those of the source; every other tensor is as it was there.
    """

    format = "safetensors"

    def __init__(self, artifact: Artifact, dtype: torch.dtype) -> None:
        self.artifact, self.dtype = artifact, dtype
        self.files = tuple(sorted({stored.file for stored in artifact.stored.values()}))
        left_out = ("quantization_config", "torch_dtype")
        self.config = {key: value for key, value in artifact.config.items() if key not in left_out}
        self.config["dtype"] = str(dtype).removeprefix("torch.")
        self._sources = Sources(model_of(self.config), _sources_of(artifact.records))
        carried = {
            stored.info.name: stored.info for stored in artifact.stored.values() if not is_part(stored.info.name)
        }
        weights = {name: TensorInfo(name, self._shape(name), dtype) for name in self._sources.tensors}
        self.tensors = carried | weights

    def read(self, name: str) -> torch.Tensor:
        return self.artifact.read(name) if name not in self._sources else self._sources.read(name, self._weight)

    def save_side_files(self, directory: Path) -> None:
        copy_side_files(self.artifact.directory, directory, but=OWN_FILES)

    def _weight(self, linear: str) -> torch.Tensor:
        return torch.cat([rows.to(self.dtype) for rows in decoded_rows(self.artifact.read_linear(linear))])

    def _shape(self, tensor: str) -> tuple[int, ...]:
        """As transformers' conversions give it, of tensors without values."""
        return tuple(self._sources.read(tensor, self._no_weight).shape)

    def _no_weight(self, linear: str) -> torch.Tensor:
        record = self.artifact.records[linear]
        return torch.empty(record.out_features, record.in_features, dtype=self.dtype, device="meta")


def decoded_rows(packed: PackedLinear) -> Iterator[torch.Tensor]:
    """W = W' Q diag(d) of codes in the stored layout, float32, some rows at a time."""
    backend = select("linear", packed.spec, packed.codes.device)
    rotation = Rotation.parse(packed.rotation, packed.in_features)
    diagonal = diagonal_of(packed.diagonal, packed.in_features)
    tile_rows = max(1, CHUNK_WEIGHTS // (TILE * packed.in_features))
    scales = packed.scales.split(tile_rows * TILE)
    for codes, part in zip(packed.codes.split(tile_rows), scales, strict=True):
        some = replace(packed, codes=codes, scales=part, out_features=len(part))
        yield unrotate_weight(backend.rotated_weight(some), rotation, diagonal)


def _sources_of(records: Mapping[str, LinearRecord]) -> dict[str, tuple[str, ...]]:
    """Linear -> the tensors of the source that it was made of. Artifacts that do not say so have experts that were
    stacked, where gate and up are one linear."""
    matches = {name: EXPERT.fullmatch(name) for name in records}
    stacked = {match["experts"] for match in matches.values() if match and match["leaf"] == "gate_up_proj"}
    result: dict[str, tuple[str, ...]] = {}
    stacks: dict[str, list[LinearRecord]] = {}
    for name, match in matches.items():
        was_stacked = match is not None and match["experts"] in stacked and not records[name].source
        plain = f"{match['experts']}.{match['leaf']}" if match is not None and was_stacked else f"{name}.weight"
        result[name] = records[name].source or (plain,)
        if match is not None and len(result[name]) == 1:
            stacks.setdefault(result[name][0], []).append(records[name])
    for tensor, members in stacks.items():
        _check_alike(tensor, members)
    return result


def _check_alike(tensor: str, records: list[LinearRecord]) -> None:
    if len({(record.out_features, record.in_features) for record in records}) > 1:
        raise ArtifactError(f"the experts in '{tensor}' differ in shape; download the model again")
