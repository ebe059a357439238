"""The one door for what safetensors files hold: plain weights as they are, encoded ones decoded, doubtful refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from qpalette.core.errors import CheckpointError
from qpalette.storage.base import Checkpoint, TensorInfo, layout_of
from qpalette.storage.quantized.base import (
    FORMATS,
    QUANTIZATION_KEYS,
    Declared,
    EncodedWeight,
    SourceFormat,
    Unread,
    Unsound,
)
from qpalette.storage.quantized.undeclared import refuse_encoded
from qpalette.storage.safetensors_source import SafetensorsCheckpoint

# One number each, which a runtime rounds activations or its cache by: the weights are the same without.
OF_ACTIVATIONS = re.compile(
    r".*\.(?:(?:input|output|[kvq]|prob)_(?:global_)?(?:scale|zero_point)|(?:input|activation)_scale_ub|qscale_act)"
    r"|.*[._]activation_scale"
)


class DecodedCheckpoint(Checkpoint):
    """`stored` with each encoded weight in place of the tensors that it is made of; one is decoded at a time."""

    def __init__(self, stored: SafetensorsCheckpoint, kind: type[SourceFormat], weights: list[EncodedWeight]) -> None:
        self.format, self.files, self.directory = kind.name, stored.files, stored.directory
        self.config = _without_quantization(stored.config)
        self._stored, self._kind = stored, kind
        self._weights = {weight.info.name: weight for weight in weights}
        by_codes = {weight.codes: weight for weight in weights}
        used = {name for weight in weights for name in weight.beside.values()}
        infos: list[TensorInfo] = []
        for info in stored.tensors.values():
            if info.name in by_codes:
                infos.append(by_codes[info.name].info)
            elif info.name not in used and not _is_of_activations(info):
                infos.append(info)
        self.tensors = layout_of(infos)
        if not len(self.tensors) == len(infos) == len({*self._weights, *(info.name for info in infos)}):
            raise Unsound("a weight is stored twice, as itself and encoded")
        refuse_encoded([info for info in infos if info.name not in self._weights], stored.directory, kind.name)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._kind.name} {self._stored.fingerprint}".encode()).hexdigest()

    def read(self, name: str) -> torch.Tensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._stored.read(name)
        if not weight.stacked:
            return self._decoded(weight, self._stored.read(weight.codes), self._beside(weight))
        result = torch.empty(weight.info.shape, dtype=weight.info.dtype)
        for index in range(len(result)):
            result[index] = self.read_part(name, index)
        return result

    def read_part(self, name: str, index: int) -> torch.Tensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._stored.read_part(name, index)
        if not weight.stacked:
            return super().read_part(name, index)
        beside = {role: self._stored.read_part(stored, index) for role, stored in weight.beside.items()}
        return self._decoded(weight, self._stored.read_part(weight.codes, index), beside)

    def check_values(self, carried: Iterable[str]) -> None:
        super().check_values(carried)
        for weight in self._weights.values():
            with told_of(self.directory):
                weight.check(self._beside(weight))

    def save_side_files(self, directory: Path) -> None:
        self._stored.save_side_files(directory)

    def _beside(self, weight: EncodedWeight) -> dict[str, torch.Tensor]:
        return {role: self._stored.read(name) for role, name in weight.beside.items()}

    def _decoded(self, weight: EncodedWeight, codes: torch.Tensor, beside: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with told_of(self.directory):
            weight.check(beside)
            result = weight.decode(codes, beside).to(weight.info.dtype)
            if not torch.isfinite(result).all():
                raise Unsound(f"tensor {weight.codes!r} has values that are not finite in {result.dtype}")
        return result.contiguous()


def as_plain(stored: SafetensorsCheckpoint) -> Checkpoint:
    """`stored` itself, or its weights decoded.

    Raises CheckpointError, with the tensor or the tool, when they are in no format that is known exactly.
    """
    declared = Declared(stored.directory, stored.config, stored.tensors, stored.read)
    kind = next((kind for kind in FORMATS if kind.recognises(declared)), None)
    with told_of(stored.directory):
        if kind is not None:
            weights = list(kind.weights(declared))
            if not weights:
                refuse_encoded(stored.tensors.values(), stored.directory, kind.name)
                raise Unsound(
                    f"config.json says {kind.name}, but no tensor is stored so; if the weights are 16-bit, remove "
                    "quantization_config from it"
                )
            return DecodedCheckpoint(stored, kind, weights)
        if declared.method is not None:
            raise Unread(f"method {declared.method!r}")
        refuse_encoded(stored.tensors.values(), stored.directory, None)
    return stored


@contextmanager
def told_of(directory: Path) -> Iterator[None]:
    try:
        yield
    except Unread as error:
        raise CheckpointError(
            f"{directory}: the model is quantized already ({error}); give the 16-bit original, or dequantize it first "
            "and save that as safetensors"
        ) from error
    except Unsound as error:
        raise CheckpointError(f"{directory}: {error}; fetch the file again, or give the 16-bit original") from error


def _without_quantization(config: Mapping[str, object]) -> dict[str, object]:
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = _without_quantization(text)
    return kept


def _is_of_activations(info: TensorInfo) -> bool:
    return OF_ACTIVATIONS.fullmatch(info.name) is not None and info.shape in ((), (1,))
