"""compressed-tensors (llm-compressor, Kimi-K2-Thinking): whole numbers, FP8, NVFP4 and MX formats, by what each stores.

Which scheme a weight has is not looked up by the patterns in `targets`: of those declared, the one that its tensors'
types and shapes are made by, and it must be the only one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from qpalette.storage.base import TensorInfo
from qpalette.storage.quantized.base import HALVES, Declared, EncodedWeight, SourceFormat, Tensors, Unread, Unsound
from qpalette.storage.quantized.numbers import FP8, bit_fields, e8m0, fp4, spread

PACKED = ".weight_packed"
PACKED_BITS = (2, 4, 8)  # others: releases disagree whether a number may lie in two words
SCALES = (torch.float32, *HALVES)
WORDS, BYTES = torch.int32, torch.uint8
# What belongs to a weight besides its scale, and to activations: those say nothing of the weight.
GLOBAL, ZERO, SHAPE, GROUPS = "weight_global_scale", "weight_zero_point", "weight_shape", "weight_g_idx"
DENSE = re.compile(r"dense|frozen|none", re.IGNORECASE)


class Scheme(BaseModel):
    """How some weights are stored: the `weights` of one of the declared groups."""

    model_config = ConfigDict(frozen=True)

    type: Literal["int", "float"] = "int"
    num_bits: PositiveInt = 8
    strategy: Literal["tensor", "channel", "group", "tensor_group", "block", None] = None
    group_size: int | None = None
    block_structure: tuple[PositiveInt, PositiveInt] | None = None
    symmetric: bool = True
    actorder: str | bool | None = None

    @property
    def per(self) -> str:
        """What has a scale of its own; where no strategy is named, the size of the groups tells."""
        return self.strategy or ("channel" if self.group_size == -1 else "group" if self.group_size else "tensor")

    @property
    def ordered(self) -> bool:
        """Columns belong to groups by a table of their own."""
        return self.actorder in (True, "group", "dynamic")

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        """The numbers that share a scale; None where the scheme does not say."""
        match self.per:
            case "tensor":
                return shape
            case "channel":
                return 1, shape[1]
            case "group" | "tensor_group":
                return (1, self.group_size) if self.group_size and self.group_size > 0 else None
            case "block":
                return self.block_structure
        return None


class Group(BaseModel):
    weights: Scheme | None = None


class Said(BaseModel):
    """The quantization_config, as far as weights need it."""

    config_groups: dict[str, Group]
    sparsity_config: dict[str, Any] | None = None

    @classmethod
    def of(cls, quantization: Mapping[str, Any]) -> Said:
        try:
            return cls.model_validate(quantization)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise Unsound(f"quantization_config: {place}: {first['msg']}") from error


@dataclass(frozen=True)
class CompressedWeight(EncodedWeight):
    scheme: Scheme

    def check(self, beside: Tensors) -> None:
        super().check(beside)
        super().check({"scale": self._scale(beside)})
        if "groups" in beside:
            self._columns(beside)
        if "zero" in beside and self.scheme.symmetric and bool(self._zeros(beside["zero"], self._shape).any()):
            raise Unsound(f"tensor {self.beside['zero']!r} is not zero, though the scheme is symmetric")

    def decode(self, codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
        shape = self._shape
        numbers = self._numbers(codes)[:, : shape[1]]
        per = self._per_number(shape, beside)
        if "zero" in beside:
            numbers.sub_(per(self._zeros(beside["zero"], shape)))
        return numbers.mul_(per(self._scale(beside)))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.info.shape[0], self.info.shape[1]

    def _numbers(self, codes: torch.Tensor) -> torch.Tensor:
        if codes.dtype == BYTES:
            return fp4(codes)
        if codes.dtype == WORDS:
            return bit_fields(codes, self.scheme.num_bits).float() - (1 << (self.scheme.num_bits - 1))
        return codes.float()

    def _scale(self, beside: Tensors) -> torch.Tensor:
        scale = beside["scale"]
        scale = e8m0(scale) if scale.dtype == BYTES else scale.float()
        return scale / beside["global"] if "global" in beside else scale

    def _zeros(self, zero: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        if zero.dtype != WORDS:
            return zero.float()
        fields = bit_fields(zero.T.contiguous(), self.scheme.num_bits).T[: shape[0]]
        return fields.float() - (1 << (self.scheme.num_bits - 1))

    def _per_number(self, shape: tuple[int, int], beside: Tensors) -> Any:
        block = self.scheme.block_of(shape)
        assert block is not None  # such a scheme fits no tensor
        if "groups" in beside and (columns := self._columns(beside)) is not None:
            return lambda grid: grid[:, columns]
        count = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        return lambda grid: spread(grid.reshape(count), block, shape)

    def _columns(self, beside: Tensors) -> torch.Tensor | None:
        """The group of each column; None where they follow one another."""
        groups = beside["groups"].long()
        if bool((groups == -1).all()):
            return None
        if not 0 <= int(groups.min()) <= int(groups.max()) < beside["scale"].shape[1]:
            raise Unsound(f"tensor {self.beside['groups']!r} names groups that are not among those of the scale")
        return groups


class CompressedTensors(SourceFormat):
    name = "compressed-tensors"

    @staticmethod
    def recognises(declared: Declared) -> bool:
        return declared.method in ("compressed-tensors", "compressed_tensors", "compressed-tensor")

    @staticmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        said = Said.of(declared.quantization)
        sparsity = str((said.sparsity_config or {}).get("format", "dense"))
        if not DENSE.search(sparsity):
            raise Unread(f"compressed-tensors of sparse weights ({sparsity}) are not read")
        schemes = tuple(dict.fromkeys(group.weights for group in said.config_groups.values() if group.weights))
        for info in declared.tensors.values():
            name = info.name
            scaled = name.endswith(".weight") and f"{name}_scale" in declared.tensors
            if name.endswith(PACKED) or scaled:
                yield _weight(declared, name.removesuffix("_packed"), info, schemes)


def _weight(declared: Declared, weight: str, codes: TensorInfo, schemes: tuple[Scheme, ...]) -> EncodedWeight:
    module = weight.removesuffix("weight")
    why = f"it is a part of {weight!r}"
    scale = declared.shape(f"{weight}_scale", (*SCALES, *FP8, BYTES), why)
    beside = {"scale": f"{weight}_scale"}
    optional = {"zero": ZERO, "global": GLOBAL, "shape": SHAPE, "groups": GROUPS}
    beside |= {role: module + name for role, name in optional.items() if module + name in declared.tensors}
    fits = [
        (scheme, shape)
        for scheme in schemes
        if (shape := _shape_by(scheme, declared, codes, beside)) and _has_parts(scheme, declared, codes, shape, beside)
    ]
    if len(fits) != 1:
        known = ", ".join(f"{s.type} of {s.num_bits} bits by {s.per}" for s in schemes) or "none is declared"
        raise Unsound(
            f"tensor {codes.name!r} ({codes.dtype} {codes.shape}, scale {scale}) is of {len(fits)} of the declared "
            f"schemes, not of one ({known})"
        )
    ((scheme, shape),) = fits
    dtype = declared.dtype if scheme.num_bits == 4 and scheme.type == "float" else declared.dtype_of(beside["scale"])
    return CompressedWeight(TensorInfo(weight, shape, dtype), codes.name, beside, scheme)


def _shape_by(
    scheme: Scheme, declared: Declared, codes: TensorInfo, beside: Mapping[str, str]
) -> tuple[int, int] | None:
    """The weight's shape if `codes` are stored as `scheme` says, else None."""
    if len(codes.shape) != 2:
        return None
    rows, columns = codes.shape
    match codes.dtype, scheme.type, scheme.num_bits:
        case (torch.uint8, "float", 4):
            return rows, columns * 2
        case (torch.int8, "int", 8) | (torch.float8_e4m3fn, "float", 8):
            return rows, columns
        case (torch.int32, "int", bits) if bits in PACKED_BITS and "shape" in beside:
            stored = tuple(declared.small(beside["shape"]).flatten().tolist())
            fits = len(stored) == 2 and stored[0] == rows and -(-stored[1] * bits // 32) == columns
            return (rows, stored[1]) if fits else None
    return None


def _has_parts(
    scheme: Scheme, declared: Declared, codes: TensorInfo, shape: tuple[int, int], beside: Mapping[str, str]
) -> bool:
    """Whether scale and zero points have the shapes, and the types, that `scheme` gives a weight of `shape`."""
    block, scale = scheme.block_of(shape), declared.tensors[beside["scale"]].shape
    if block is None or (scheme.per == "group" and shape[1] % block[1]):
        return False
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    flat = (grid[0],) if grid[1] == 1 else None
    if scale not in (grid, flat) and not (grid == (1, 1) and scale in ((), (1,))):
        return False
    if (scheme.per == "tensor_group") != ("global" in beside) or (scheme.ordered and "groups" not in beside):
        return False
    if not _is_of_zeros(declared.tensors.get(beside.get("zero", "")), scheme, grid, shape, codes):
        return False
    others = {"global": (1, (torch.float32,)), "groups": (shape[1], (torch.int32, torch.int64))}
    for role, (size, dtypes) in others.items():
        info = declared.tensors.get(beside.get(role, ""))
        if info is not None and (math.prod(info.shape) != size or info.dtype not in dtypes):
            return False
    dtype = declared.tensors[beside["scale"]].dtype
    expected = FP8 if scheme.per == "tensor_group" else (*SCALES, BYTES) if scheme.group_size == 32 else SCALES
    return dtype in expected


def _is_of_zeros(
    zero: TensorInfo | None, scheme: Scheme, grid: tuple[int, int], shape: tuple[int, int], codes: TensorInfo
) -> bool:
    """Whether zero points, or none, suit a scheme: one per scale, those of packed groups and rows packed along rows."""
    if zero is None:
        return scheme.symmetric
    if codes.dtype == WORDS and zero.dtype == WORDS:
        return zero.shape == (-(-shape[0] * scheme.num_bits // 32), grid[1])
    return math.prod(zero.shape) == math.prod(grid) and zero.dtype in (torch.int8, *FP8, *SCALES)
