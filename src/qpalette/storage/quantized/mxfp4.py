"""MXFP4 as gpt-oss has it: experts in stacks, blocks of 32 numbers of four bits with an exponent each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qpalette.storage.base import TensorInfo
from qpalette.storage.quantized.base import Declared, EncodedWeight, SourceFormat, Tensors, Unsound
from qpalette.storage.quantized.numbers import e8m0, fp4

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_BYTES = 16


@dataclass(frozen=True)
class StackedMxfp4(EncodedWeight):
    """Codes [experts, rows, blocks, 16], exponents [experts, rows, blocks]; the model has [experts, columns, rows]."""

    def check(self, beside: Tensors) -> None:
        super().check({"exponents": e8m0(beside["exponents"])})

    def decode(self, codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
        numbers = fp4(codes) * e8m0(beside["exponents"]).unsqueeze(-1)
        return numbers.flatten(start_dim=-2).T.contiguous()


class Mxfp4(SourceFormat):
    name = "MXFP4"

    @staticmethod
    def recognises(declared: Declared) -> bool:
        return declared.method == "mxfp4"

    @staticmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        for name in declared.tensors:
            if not name.endswith(BLOCKS):
                continue
            logical = name.removesuffix(BLOCKS)
            shape = declared.shape(name, (torch.uint8,), "it holds FP4 numbers")
            if len(shape) != 4 or shape[-1] != BLOCK_BYTES:
                raise Unsound(f"tensor {name!r} has shape {shape}, not experts x rows x blocks x {BLOCK_BYTES}")
            exponents = declared.shape(logical + SCALES, (torch.uint8,), f"it has the exponents of {name!r}")
            if exponents != shape[:-1]:
                raise Unsound(
                    f"tensor {logical + SCALES!r} has shape {exponents}, not {shape[:-1]} as {name!r} asks for"
                )
            experts, rows, blocks, _ = shape
            info = TensorInfo(logical, (experts, blocks * BLOCK_BYTES * 2, rows), declared.dtype)
            yield StackedMxfp4(info, name, {"exponents": logical + SCALES}, stacked=True)
