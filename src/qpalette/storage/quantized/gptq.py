"""GPTQ, versions 1 and 2 of its layout: 2, 3, 4 or 8 bits, a scale and a zero point for each group of inputs.

A word holds numbers of one output for consecutive inputs. Version 1 stores zero points less one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qpalette.storage.base import TensorInfo
from qpalette.storage.quantized.base import HALVES, Declared, EncodedWeight, SourceFormat, Tensors, Unread, Unsound
from qpalette.storage.quantized.numbers import bit_fields

LAYOUTS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is added to a stored zero point
BITS = (2, 3, 4, 8)
FLOATS = (*HALVES, torch.float32)


@dataclass(frozen=True)
class GptqWeight(EncodedWeight):
    bits: int
    group: int  # inputs, where no g_idx says which group each belongs to
    offset: int
    symmetric: bool

    def check(self, beside: Tensors) -> None:
        super().check(beside)
        self._zeros(beside["zeros"])
        if "groups" in beside:
            self._groups(beside)

    def decode(self, codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
        numbers = bit_fields(codes.T.contiguous(), self.bits)
        groups = self._groups(beside)
        zeros, scales = self._zeros(beside["zeros"])[groups].T, beside["scales"].float()[groups].T
        return (numbers.int() - zeros) * scales

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """int32 [groups, out_features]."""
        zeros = bit_fields(words, self.bits).int() + self.offset
        if int(zeros.max()) >> self.bits:  # readers disagree: some let it overflow to 0
            raise Unsound(f"tensor {self.beside['zeros']!r}: zero points of {int(zeros.max())} in {self.bits} bits")
        middle = 1 << (self.bits - 1)
        if self.symmetric and not bool((zeros == middle).all()):
            raise Unsound(
                f"tensor {self.beside['zeros']!r}: zero points are not {middle}, though sym is true; checkpoint_format "
                "in config.json (gptq or gptq_v2) may be the other one"
            )
        return zeros

    def _groups(self, beside: Tensors) -> torch.Tensor:
        count = len(beside["scales"])
        if "groups" not in beside:
            return torch.arange(self.info.shape[1]) // self.group
        groups = beside["groups"].long()
        if not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise Unsound(f"tensor {self.beside['groups']!r} names groups that are not among {count}")
        return groups


class Gptq(SourceFormat):
    name = "GPTQ"

    @staticmethod
    def recognises(declared: Declared) -> bool:
        return declared.method == "gptq"

    @staticmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        said = declared.quantization
        layout = str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()
        if layout not in LAYOUTS:
            raise Unread(f"GPTQ; checkpoint_format {layout!r} is not read, these are: {', '.join(LAYOUTS)}")
        for name in declared.tensors:
            if name.endswith(".qweight"):
                yield _weight(declared, name.removesuffix(".qweight"), LAYOUTS[layout])


def _weight(declared: Declared, module: str, offset: int) -> EncodedWeight:
    said, why = declared.quantization, f"it is a part of the weight of {module!r}"
    words, outputs = _matrix(declared, f"{module}.qweight", (torch.int32,), why)
    groups, zero_words = _matrix(declared, f"{module}.qzeros", (torch.int32,), why)
    if _matrix(declared, f"{module}.scales", FLOATS, why) != (groups, outputs):
        raise Unsound(f"tensor '{module}.scales' does not have the shape {(groups, outputs)} of the zero points")
    bits = _bits(said, module, zero_words, outputs)
    inputs, rest = divmod(words * 32, bits)
    if rest:
        raise Unsound(f"tensor '{module}.qweight' has {words} words, which are no whole numbers of {bits} bits")
    beside = {"zeros": f"{module}.qzeros", "scales": f"{module}.scales"}
    group = _group_size(said, inputs)
    if f"{module}.g_idx" in declared.tensors:
        beside["groups"] = f"{module}.g_idx"
        indices = declared.shape(beside["groups"], (torch.int32, torch.int64), why)
        if indices != (inputs,):
            raise Unsound(f"tensor {beside['groups']!r} has shape {indices}, but the codes are of {inputs} inputs")
    elif said.get("desc_act") or -(-inputs // group) != groups:
        raise Unsound(f"tensor '{module}.g_idx' is missing: {groups} groups of {group} do not say what they are of")
    info = TensorInfo(f"{module}.weight", (outputs, inputs), declared.dtype_of(f"{module}.scales"))
    symmetric = said.get("sym") is True
    return GptqWeight(info, f"{module}.qweight", beside, bits, group, offset, symmetric)


def _matrix(declared: Declared, name: str, dtypes: tuple[torch.dtype, ...], why: str) -> tuple[int, int]:
    shape = declared.shape(name, dtypes, why)
    if len(shape) != 2 or 0 in shape:
        raise Unsound(f"tensor {name!r} has shape {shape}, not that of a matrix: {why}")
    return shape[0], shape[1]


def _bits(said: Mapping[str, Any], module: str, zero_words: int, outputs: int) -> int:
    """As declared, or, where rules for single modules are declared, as the zero points' shape tells."""
    bits, rest = divmod(zero_words * 32, outputs)
    if rest or bits not in BITS or (bits != said.get("bits") and not said.get("dynamic")):
        raise Unsound(
            f"tensor '{module}.qzeros' has {zero_words} words for {outputs} outputs, which does not fit "
            f"{said.get('bits')} bits"
        )
    return bits


def _group_size(said: Mapping[str, Any], inputs: int) -> int:
    size = said.get("group_size")
    return size if type(size) is int and size > 0 else inputs
