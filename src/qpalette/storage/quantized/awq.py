"""AWQ in its layout "gemm": a word holds four bits of eight consecutive outputs, in an order of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qpalette.storage.base import TensorInfo
from qpalette.storage.quantized.base import Declared, EncodedWeight, SourceFormat, Tensors, Unread, Unsound
from qpalette.storage.quantized.numbers import bit_fields

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the outputs 0 to 7 are


@dataclass(frozen=True)
class AwqWeight(EncodedWeight):
    group: int

    def decode(self, codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
        zeros = _outputs(beside["zeros"]).repeat_interleave(self.group, dim=0)
        scales = beside["scales"].float().repeat_interleave(self.group, dim=0)
        return ((_outputs(codes) - zeros) * scales).T.contiguous()


class Awq(SourceFormat):
    name = "AWQ"

    @staticmethod
    def recognises(declared: Declared) -> bool:
        return declared.method == "awq"

    @staticmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        said = declared.quantization
        layout = str(said.get("version") or said.get("format") or "gemm").lower()
        bits = said.get("bits", said.get("w_bit", BITS))
        if layout != "gemm" or bits != BITS or said.get("zero_point", True) is not True:
            raise Unread(f"AWQ of {bits} bits in layout {layout!r} is not read: only 4 bits, gemm, with zero points")
        for name in declared.tensors:
            if name.endswith(".qweight"):
                yield _weight(declared, name.removesuffix(".qweight"))
            elif name.endswith(".act.scales"):
                raise Unread(f"AWQ; tensor {name!r} divides an activation, which the plain model does not do")


def _weight(declared: Declared, module: str) -> EncodedWeight:
    why = f"it is a part of the weight of {module!r}"
    shape = declared.shape(f"{module}.qweight", (torch.int32,), why)
    zeros = declared.shape(f"{module}.qzeros", (torch.int32,), why)
    scales = declared.shape(f"{module}.scales", (torch.float16, torch.bfloat16, torch.float32), why)
    if not len(shape) == len(zeros) == 2 or 0 in shape + zeros:
        raise Unsound(f"tensors '{module}.qweight' and '{module}.qzeros' are not matrices: {shape}, {zeros}")
    inputs, outputs = shape[0], shape[1] * 32 // BITS
    size = declared.quantization.get("group_size", declared.quantization.get("q_group_size"))
    group = size if type(size) is int and size > 0 else inputs
    if zeros != (inputs // group, shape[1]) or scales != (inputs // group, outputs) or inputs % group:
        raise Unsound(f"tensors of {module!r}: {zeros} zero points and {scales} scales do not fit groups of {group}")
    info = TensorInfo(f"{module}.weight", (outputs, inputs), declared.dtype_of(f"{module}.scales"))
    return AwqWeight(info, f"{module}.qweight", {"zeros": f"{module}.qzeros", "scales": f"{module}.scales"}, group)


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, outputs / 8] -> int32 [n, outputs]."""
    eights = bit_fields(words, BITS).unflatten(-1, (-1, len(PLACES)))
    return eights[..., list(PLACES)].flatten(start_dim=-2).int()
