"""Opens a quantized model: every invariant that headers can show is checked before a weight is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qpalette.core.errors import ArtifactError, CheckpointError
from qpalette.core.records import LinearRecord, PackedBits
from qpalette.formats.packed import QuantizationFormat
from qpalette.formats.parts import check_values, expected_tensors, is_part, packed_linear_of, parts_of, total_bits
from qpalette.formats.shares import stored_shares
from qpalette.models.multiplied import Shares
from qpalette.runtime import PackedLinear
from qpalette.storage.safetensors_format import StoredTensor, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Inspection:
    """What an artifact is, from its headers alone."""

    model_type: str
    provenance: Mapping[str, str]
    linears: int
    weights: int  # in the quantized linears
    bits: PackedBits  # of the quantized linears, everything counted
    specs: Mapping[str, int]  # weights by spec
    carried_tensors: int  # stored as they were in the source
    carried_bytes: int
    files: tuple[str, ...]
    shares: Shares  # of what multiplies, packed or not

    @property
    def rate(self) -> Fraction:
        """Counted bits per quantized weight."""
        return self.bits.rate

    @property
    def tensor_bytes(self) -> int:
        """All tensors together, the carried ones included."""
        return self.bits.total // 8 + self.carried_bytes


@dataclass(frozen=True)
class Artifact:
    """An opened quantized model; `open_artifact` makes one. Only `read` and `read_linear` touch weights."""

    directory: Path
    config: Mapping[str, Any]  # the whole config.json
    format: QuantizationFormat
    records: Mapping[str, LinearRecord]  # linear name -> how to decode it
    stored: Mapping[str, StoredTensor]  # every tensor by name

    def read(self, name: str) -> torch.Tensor:
        """Any tensor as it is stored, on the CPU. Raises ArtifactError when absent or its bytes cannot be read."""
        if name not in self.stored:
            raise ArtifactError(f"{self.directory}: there is no tensor '{name}'")
        stored = self.stored[name]
        info = stored.info
        raw = np.fromfile(stored.file, np.uint8, info.nbytes, offset=stored.offset)
        if raw.nbytes != info.nbytes:
            raise ArtifactError(f"{stored.file}: tensor '{name}' ends too early; the file changed since it was opened")
        return torch.from_numpy(raw).view(info.dtype).reshape(info.shape)

    def read_linear(self, name: str) -> PackedLinear:
        """The packed tensors of one linear, values checked.

        Raises ArtifactError when there is no such linear, a scale or the diagonal is not finite, or a sign bit is set
        beyond K.
        """
        if name not in self.records:
            raise ArtifactError(f"{self.directory}: there is no quantized linear '{name}'")
        record = self.records[name]
        tensors = {part.suffix: self.read(f"{name}.{part.suffix}") for part in parts_of(record)}
        check_values(name, record, tensors)
        return packed_linear_of(record, tensors)

    def bits(self) -> PackedBits:
        """Counted bits of all quantized linears; `open_artifact` has compared them with the stored bytes."""
        return total_bits(self.records.values())

    def inspect(self) -> Inspection:
        """Figures for a person or a program, no weight read."""
        bits = self.bits()
        specs: Counter[str] = Counter()
        for record in self.records.values():
            specs[record.spec] += record.out_features * record.in_features
        carried = [tensor.info for name, tensor in self.stored.items() if not is_part(name)]
        return Inspection(
            model_type=str(self.config.get("model_type", "unknown")),
            provenance=self.format.provenance,
            linears=len(self.records),
            weights=bits.weights,
            bits=bits,
            specs=dict(sorted(specs.items())),
            carried_tensors=len(carried),
            carried_bytes=sum(info.nbytes for info in carried),
            files=tuple(sorted({tensor.file.name for tensor in self.stored.values()})),
            shares=stored_shares(self.config, self.records, (tensor.info for tensor in self.stored.values())),
        )


def open_artifact(directory: str | Path) -> Artifact:
    """Open a quantized model directory, reading config.json and the safetensors headers only.

    Raises ArtifactError for each invariant of docs/format.md that does not hold, naming the file, linear or tensor.
    """
    directory = Path(directory)
    config = _read_json(directory / "config.json")
    if not isinstance(config.get("quantization_config"), dict):
        raise ArtifactError(f"{directory / 'config.json'} has no quantization_config: the model is not quantized")
    parsed = QuantizationFormat.parse(config["quantization_config"])
    stored = _stored_tensors(directory)
    artifact = Artifact(directory, config, parsed, parsed.records, stored)
    for name, record in artifact.records.items():
        _check_linear(name, record, stored)
    _check_no_strays(artifact)
    return artifact


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; give the directory of a quantized model")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{file} holds no JSON object; download it again")
    return content


def _stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(directory):
        try:
            tensors = read_header(file)
        except (CheckpointError, OSError) as error:
            raise ArtifactError(str(error)) from error
        for tensor in tensors:
            if tensor.info.name in stored:
                raise ArtifactError(f"tensor '{tensor.info.name}' is in {stored[tensor.info.name].file} and in {file}")
            stored[tensor.info.name] = tensor
    return stored


def _weight_files(directory: Path) -> list[Path]:
    """The shards that the index names, or the single file; names must stay inside the directory."""
    if not (directory / INDEX).exists():
        names = {SINGLE}
    else:
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ArtifactError(f"{directory / INDEX} has no weight_map; download it again")
        names = set(map(str, weight_map.values()))
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ArtifactError(f"{directory / INDEX} names {name!r}, which is no safetensors file beside it")
        if not (directory / name).is_file():
            raise ArtifactError(f"{directory / name} is missing; download it")
    if names != {SINGLE} and (directory / SINGLE).is_file():  # which transformers reads, and nothing else
        raise ArtifactError(
            f"{directory / SINGLE} lies beside {INDEX}, which names other files; remove what is not of this model"
        )
    return [directory / name for name in sorted(names)]


def _check_linear(name: str, record: LinearRecord, stored: Mapping[str, StoredTensor]) -> None:
    for suffix, (dtype, shape) in expected_tensors(record).items():
        tensor = f"{name}.{suffix}"
        if tensor not in stored:
            raise ArtifactError(f"tensor '{tensor}' is missing: config.json says that {name} is {record.spec}")
        info = stored[tensor].info
        if (info.dtype, info.shape) != (dtype, shape):
            raise ArtifactError(f"tensor '{tensor}' is {info.dtype} {info.shape}, but must be {dtype} {shape}")
    if f"{name}.weight" in stored:
        raise ArtifactError(f"tensor '{name}.weight' lies beside packed codes of the same linear; remove one")
    bias = stored.get(f"{name}.bias")
    if bias is not None and bias.info.shape != (record.out_features,):
        raise ArtifactError(f"tensor '{name}.bias' has shape {bias.info.shape}, but must have ({record.out_features},)")


def _check_no_strays(artifact: Artifact) -> None:
    """Packed tensors and counted bits must be the same thing, to the byte."""
    packed = {name: tensor for name, tensor in artifact.stored.items() if is_part(name)}
    owned = {f"{name}.{part.suffix}" for name, record in artifact.records.items() for part in parts_of(record)}
    if stray := sorted(packed.keys() - owned):
        raise ArtifactError(f"tensor '{stray[0]}' belongs to no linear of config.json ({len(stray)} such)")
    counted, found = artifact.bits().total, 8 * sum(tensor.info.nbytes for tensor in packed.values())
    if counted != found:
        raise ArtifactError(f"the packed tensors hold {found} bits, but the rates count {counted}: please report this")
