"""What a source format is: how a checkpoint says that it has it, and which stored tensors make a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from qpalette.storage.base import TensorInfo

QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second is compressed-tensors' older name
Tensors = Mapping[str, torch.Tensor]
HALVES = (torch.float16, torch.bfloat16)
MODEL_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MOST_BYTES = 4096  # of a tensor that is read before the work: some hold shapes
FORMATS: list[type[SourceFormat]] = []  # every one, in the order of their files' names


class Unsound(Exception):
    """What is wrong with a checkpoint; who catches it puts the directory before it, and a way out behind."""


class Unread(Unsound):
    """The format is not one that is decoded."""


@dataclass(frozen=True)
class Declared:
    """What a checkpoint says of itself, in its JSON files and headers."""

    directory: Path
    config: Mapping[str, Any]  # config.json
    tensors: Mapping[str, TensorInfo]  # as they are stored
    read: Callable[[str], torch.Tensor]

    @property
    def quantization(self) -> Mapping[str, Any]:
        """What says how the weights are stored; empty where nothing does."""
        for config in (self.config, self.config.get("text_config")):
            for key in QUANTIZATION_KEYS:
                if isinstance(config, Mapping) and config.get(key):
                    found = config[key]
                    return found if isinstance(found, Mapping) else {"quant_method": repr(found)}
        return {}

    @property
    def method(self) -> str | None:
        """Its quant_method, lower case; None where nothing says how weights are stored."""
        return str(self.quantization.get("quant_method", "unknown")).lower() if self.quantization else None

    @property
    def dtype(self) -> torch.dtype:
        """The float type that the model computes in."""
        configs = [each for each in (self.config, self.config.get("text_config")) if isinstance(each, Mapping)]
        names = [str(config.get(key)) for config in configs for key in ("dtype", "torch_dtype")]
        known = [MODEL_DTYPES[name] for name in names if name in MODEL_DTYPES]
        return known[0] if known else torch.bfloat16

    def small(self, name: str) -> torch.Tensor:
        """The content of a stored tensor that describes another one."""
        if self.tensors[name].nbytes > MOST_BYTES:
            raise Unsound(f"tensor {name!r} has {self.tensors[name].nbytes} bytes, where a few are expected")
        return self.read(name)

    def dtype_of(self, scale: str) -> torch.dtype:
        """What a weight with such a scale decodes to: its type, if it is one that models compute in."""
        dtype = self.tensors[scale].dtype
        return dtype if dtype in HALVES else self.dtype

    def shape(self, name: str, dtypes: tuple[torch.dtype, ...], why: str) -> tuple[int, ...]:
        """The shape of a stored tensor. Raises Unsound when there is none, or one of another type; `why` it must be."""
        info = self.tensors.get(name)
        if info is None:
            raise Unsound(f"tensor {name!r} is missing: {why}")
        if info.dtype not in dtypes:
            raise Unsound(f"tensor {name!r} is {info.dtype}, not {' or '.join(map(str, dtypes))}: {why}")
        return info.shape


@dataclass(frozen=True)
class EncodedWeight(ABC):
    """One weight and the stored tensors that it is made of. Subclasses say how."""

    info: TensorInfo  # of the decoded weight
    codes: str  # the stored tensor that takes its place
    beside: Mapping[str, str]  # what is read with the codes: role -> stored tensor
    stacked: bool = field(default=False, kw_only=True)  # over the first dimension of all parts, each decoded by itself

    def check(self, beside: Tensors) -> None:
        """Raises Unsound when what is `beside` the codes cannot be right."""
        for role, tensor in beside.items():
            if tensor.dtype.is_floating_point and not torch.isfinite(tensor.float()).all():
                raise Unsound(f"tensor {self.beside[role]!r} has values that are not finite")

    @abstractmethod
    def decode(self, codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
        """The weight in the shape of `info`, or of one part of a stack; float32."""


class SourceFormat(ABC):
    """Subclasses register themselves."""

    name: ClassVar[str]  # as a person calls it

    def __init_subclass__(cls) -> None:
        FORMATS.append(cls)

    @staticmethod
    @abstractmethod
    def recognises(declared: Declared) -> bool: ...

    @staticmethod
    @abstractmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        """Every weight that is not stored as itself, from headers. Raises Unsound naming what does not fit."""
