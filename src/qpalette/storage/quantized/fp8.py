"""FP8 with a scale for each block, channel or tensor: DeepSeek's, transformers' FineGrainedFP8, FBGEMM's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qpalette.storage.base import TensorInfo
from qpalette.storage.quantized.base import Declared, EncodedWeight, SourceFormat, Tensors, Unsound
from qpalette.storage.quantized.numbers import FP8, e8m0, fp4, spread

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
FP4_BLOCK = 32  # numbers per scale in DeepSeek-V4's experts
# What a tensor's scale is called beside it; the "inv" of DeepSeek's is no inverse: it multiplies, too.
SUFFIXES = ("_scale_inv", "_scale")
ENDINGS = (".scale", ".qscale_weight")  # in place of ".weight"


@dataclass(frozen=True)
class ScaledWeight(EncodedWeight):
    """Numbers times a scale for each block of the last two dimensions."""

    block: tuple[int, int]
    packed: bool = False  # two FP4 numbers per byte

    def check(self, beside: Tensors) -> None:
        scale = beside["scale"]
        super().check({"scale": e8m0(scale) if scale.dtype == torch.uint8 else scale})

    def decode(self, codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
        numbers = fp4(codes) if self.packed else codes.float()
        scale = beside["scale"]
        scale = e8m0(scale) if scale.dtype == torch.uint8 else scale.float()
        rows, columns = numbers.shape
        grid = scale.reshape(-(-rows // self.block[0]), -(-columns // self.block[1]))
        return numbers.mul_(spread(grid, self.block, (rows, columns)))


class Fp8(SourceFormat):
    name = "FP8"

    @staticmethod
    def recognises(declared: Declared) -> bool:
        return declared.method in ("fp8", "fbgemm_fp8")

    @staticmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        of_experts = declared.quantization.get("expert_dtype") == "fp4"
        for info in declared.tensors.values():
            packed = of_experts and info.dtype == torch.int8
            if len(info.shape) < 2:
                continue
            if info.dtype in FP8 or packed:
                yield _weight(declared, info, packed)
            elif scales := _scales_of(declared, info.name):
                raise Unsound(f"tensor {info.name!r} is {info.dtype}, not FP8, and {scales[0]!r} is its scale")


def _weight(declared: Declared, info: TensorInfo, packed: bool) -> EncodedWeight:
    scale = scale_of(declared, info.name)
    dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES
    if declared.quantization.get("scale_fmt") == "ue8m0":
        dtypes = (*dtypes, torch.uint8)
    grid = declared.shape(scale, dtypes, f"it is the scale of {info.name!r}")
    shape = (*info.shape[:-1], info.shape[-1] * 2) if packed else info.shape
    declared_block = (1, FP4_BLOCK) if packed else declared.quantization.get("weight_block_size")
    block = block_of(shape, grid, declared_block, f"{scale!r}")
    logical = TensorInfo(info.name, shape, declared.dtype)
    return ScaledWeight(logical, info.name, {"scale": scale}, block, packed, stacked=len(shape) == 3)


def scale_of(declared: Declared, name: str) -> str:
    """The stored scale of the tensor `name`. Raises Unsound when there is none, or more than one could be it."""
    found = _scales_of(declared, name)
    if len(found) != 1:
        raise Unsound(f"tensor {name!r} is FP8 and has {'no scale' if not found else 'scales ' + ' and '.join(found)}")
    return found[0]


def _scales_of(declared: Declared, name: str) -> list[str]:
    module = name.removesuffix(".weight")
    names = [name + suffix for suffix in SUFFIXES] + [module + ending for ending in ENDINGS if module != name]
    return [candidate for candidate in names if candidate in declared.tensors]


def block_of(shape: tuple[int, ...], grid: tuple[int, ...], declared: object, scale: str) -> tuple[int, int]:
    """How many rows and columns of a matrix, or of each one of a stack, share a value of `grid`, a scale's shape.

    `declared` is the config's block, if it has one; a scale of one value, or of one per row or column, needs none.
    Raises Unsound when they do not fit.
    """
    rows, columns = shape[-2:]
    if math.prod(grid) == 1 and len(shape) == 2:
        return rows, columns
    if isinstance(declared, list | tuple) and len(declared) == 2 and all(type(n) is int and n > 0 for n in declared):
        block = (declared[0], declared[1])
        if grid != (*shape[:-2], -(-rows // block[0]), -(-columns // block[1])):
            raise Unsound(f"tensor {scale} has shape {grid}, which does not fit {shape} in blocks of {block}")
        return block
    full = (*grid, 1) if len(grid) == len(shape) - 1 else grid  # a vector has a value per row
    if len(full) != len(shape) or full[:-2] != shape[:-2] or not _broadcasts(full[-2:], (rows, columns)):
        raise Unsound(f"tensor {scale} has shape {grid}, which does not fit a weight of {shape} without a block size")
    return rows // full[-2], columns // full[-1]


def _broadcasts(grid: tuple[int, ...], shape: tuple[int, int]) -> bool:
    return all(count in (1, size) for count, size in zip(grid, shape, strict=True)) and grid != shape
