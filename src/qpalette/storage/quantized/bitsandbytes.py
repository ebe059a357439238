"""bitsandbytes: NF4 and FP4 in blocks of one dimension, and whole numbers of eight bits with a scale for each row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qpalette.storage.base import TensorInfo
from qpalette.storage.quantized.base import MODEL_DTYPES, Declared, EncodedWeight, SourceFormat, Tensors, Unsound
from qpalette.storage.quantized.numbers import nibbles

STATE = ".quant_state.bitsandbytes__"
NESTED = ("nested_absmax", "nested_quant_map")
ROW_SCALE = 7.874015718698502e-3  # 1 / 127, as the library writes it


@dataclass(frozen=True)
class BlockWeight(EncodedWeight):
    """Codes index `quant_map`; each block of numbers, counted through the whole matrix, has an `absmax`, which may be
    codes itself, of eight bits, around `offset`."""

    block: int
    nested_block: int
    offset: float

    def decode(self, codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
        pairs = nibbles(codes.flatten()).unflatten(0, (-1, 2)).flip(1).flatten()  # the high four bits come first
        numbers = beside["quant_map"].float()[pairs]
        scales = self._absmax(beside).repeat_interleave(self.block)[: len(numbers)]
        return (numbers * scales).reshape(self.info.shape)

    def check(self, beside: Tensors) -> None:
        super().check(beside)
        super().check({"absmax": self._absmax(beside)})

    def _absmax(self, beside: Tensors) -> torch.Tensor:
        if "nested_absmax" not in beside:
            return beside["absmax"].float()
        codes = beside["absmax"].int()
        scales = beside["nested_absmax"].repeat_interleave(self.nested_block)[: len(codes)]
        return beside["nested_quant_map"].float()[codes] * scales + self.offset


@dataclass(frozen=True)
class RowWeight(EncodedWeight):
    def decode(self, codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
        return codes.float() * beside["scale"].reshape(-1, 1) * ROW_SCALE


class BitsAndBytes(SourceFormat):
    name = "bitsandbytes"

    @staticmethod
    def recognises(declared: Declared) -> bool:
        method = declared.method or ""
        return method.startswith("bitsandbytes") or (
            method == "unknown"
            and bool(declared.quantization.get("load_in_4bit") or declared.quantization.get("load_in_8bit"))
        )

    @staticmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        for name in declared.tensors:
            if STATE in name:
                yield _of_blocks(declared, name)
            elif name.endswith(".SCB"):
                yield _of_rows(declared, name.removesuffix(".SCB"))


def _of_blocks(declared: Declared, state_name: str) -> EncodedWeight:
    weight = state_name.partition(STATE)[0]
    state = _state(declared, state_name)
    shape = tuple(state["shape"])
    count, why = math.prod(shape), f"it is a part of {weight!r}"
    sizes = {weight: -(-count // 2), f"{weight}.quant_map": 16, f"{weight}.absmax": -(-count // state["blocksize"])}
    dtypes: dict[str, tuple[torch.dtype, ...]] = {weight: (torch.uint8,)}
    nested = f"{weight}.nested_absmax" in declared.tensors
    if nested:
        sizes[f"{weight}.nested_quant_map"] = 256
        sizes[f"{weight}.nested_absmax"] = -(-sizes[f"{weight}.absmax"] // state["nested_blocksize"])
        dtypes[f"{weight}.absmax"] = (torch.uint8,)
    for name, size in sizes.items():
        stored = declared.shape(name, dtypes.get(name, (torch.float32,)), why)
        if math.prod(stored) != size:
            raise Unsound(f"tensor {name!r} has {math.prod(stored)} numbers, not {size}: {why}")
    roles = ("absmax", "quant_map", *(NESTED if nested else ()))
    beside = {role: f"{weight}.{role}" for role in roles} | {"state": state_name}
    info = TensorInfo(weight, shape, MODEL_DTYPES[state["dtype"]])
    return BlockWeight(info, weight, beside, state["blocksize"], state["nested_blocksize"], state["nested_offset"])


def _state(declared: Declared, name: str) -> Mapping[str, Any]:
    """What the library writes as JSON into a tensor of bytes, every field checked."""
    declared.shape(name, (torch.uint8,), "it is the state of a weight")
    try:
        state = {"nested_blocksize": 1, "nested_offset": 0.0} | json.loads(bytes(declared.small(name).tolist()))
        numbers = [*state["shape"], state["blocksize"], state["nested_blocksize"]]
        sound = len(state["shape"]) == 2 and all(type(number) is int and number > 0 for number in numbers)
        sound = sound and math.isfinite(state["nested_offset"]) and state["dtype"] in MODEL_DTYPES
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Unsound(f"tensor {name!r} holds no state of a weight ({type(error).__name__}: {error})") from error
    if not sound:
        raise Unsound(f"tensor {name!r} holds a state that means nothing: {str(state)[:200]}")
    return state


def _of_rows(declared: Declared, module: str) -> EncodedWeight:
    weight, scale = f"{module}.weight", f"{module}.SCB"
    shape = declared.shape(weight, (torch.int8,), f"{scale!r} is its scale")
    rows = declared.shape(scale, (torch.float32,), f"it is the scale of {weight!r}")
    if len(shape) != 2 or rows != (shape[0],):
        raise Unsound(f"tensor {scale!r} has shape {rows}, which does not fit {weight!r} of {shape}")
    beside, layout = {"scale": scale}, f"{module}.weight_format"
    if layout in declared.tensors:
        beside["layout"] = layout
        if math.prod(declared.tensors[layout].shape) != 1 or declared.small(layout).item() != 0:
            raise Unsound(f"tensor {layout!r} says that {weight!r} is not stored by rows")
    return RowWeight(TensorInfo(weight, shape, declared.dtype), weight, beside)
