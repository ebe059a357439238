"""Formats that are known and not read: told by name, with what gives them away."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qpalette.storage.quantized.base import Declared, EncodedWeight, SourceFormat, Unread


class Mlx(SourceFormat):
    name = "MLX"

    @staticmethod
    def recognises(declared: Declared) -> bool:
        said = declared.config.get("quantization")  # as well as in quantization_config, without a quant_method
        by_config = isinstance(said, dict) and "bits" in said and "quant_algo" not in said
        words = any(info.dtype == torch.uint32 and name.endswith(".weight") for name, info in declared.tensors.items())
        return words and (by_config or declared.method in (None, "unknown"))

    @staticmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        raise Unread("the weights are MLX's, packed in uint32, which is not read")


class ModelOpt(SourceFormat):
    name = "ModelOpt"

    @staticmethod
    def recognises(declared: Declared) -> bool:
        said = declared.quantization
        here = (declared.directory / "hf_quant_config.json").is_file()
        return (declared.method or "").startswith("modelopt") or "quant_algo" in said or (here and not said)

    @staticmethod
    def weights(declared: Declared) -> Iterator[EncodedWeight]:
        raise Unread("the weights are NVIDIA ModelOpt's (hf_quant_config.json, quant_algo), which are not read")
