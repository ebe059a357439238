"""Scaled rotary positions of a GGUF file as transformers' `rope_parameters`, which transformers itself leaves out.

Scaling that has no exact counterpart there is refused: without it a model answers, and wrongly beyond its first
context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import CheckpointError

# Llama 3's rotary scaling: a GGUF file keeps the resulting factors only, and these are what made them.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Of `rope.scaling.*`, what means nothing at these values: neither file nor llama.cpp then asks for more.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alpha": (0.0,),
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (1.0, -1.0),
    "yarn_log_multiplier": (0.0,),
    "finetuned": (True, False),
}
OF_YARN = ("original_context_length", "yarn_beta_fast", "yarn_beta_slow")  # nothing else reads them
TYPES = {"linear": OF_YARN, "yarn": (*OF_YARN, "attn_factor")}
WAY_OUT = "give the model's safetensors directory instead"


def scaled_rope(
    file: Path, config: Mapping[str, Any], scaling: Mapping[str, Any], factors: torch.Tensor | None
) -> dict[str, Any] | None:
    """The rope_parameters that a file asks for; None where it asks for those that `config` has.

    `scaling` are its metadata `rope.scaling.*` without that prefix; `factors` (head_dim / 2 divisors of the rotary
    frequencies) its tensor. Raises CheckpointError naming the scaling when transformers cannot have it.
    """
    asked = _scaling(file, scaling)
    if factors is not None and asked is not None:
        raise CheckpointError(f"{file} has both rope_freqs and rope.scaling, which is not known here; {WAY_OUT}")
    own = config.get("rope_parameters") or {}
    if factors is not None:
        return _llama3_rope(file, own, factors.double())
    if asked is None:
        return None
    if "full_attention" in own:  # sliding windows are shorter than any context that wants scaling: they have none
        return {**own, "full_attention": {**own["full_attention"], **asked}}
    if "rope_theta" not in own:
        kind = config.get("model_type")
        raise CheckpointError(f"{file} asks for rope.scaling, and transformers' {kind} has no place for it; {WAY_OUT}")
    return {**own, **asked}


def _scaling(file: Path, given: Mapping[str, Any]) -> dict[str, Any] | None:
    factor = given.get("factor", given.get("scale_linear"))
    kind = given.get("type", "none" if factor is None else "linear")  # as llama.cpp takes it
    odd = {key: value for key, value in given.items() if value not in NEUTRAL.get(key, ())}
    odd = {key: value for key, value in odd.items() if key not in ("type", "factor", "scale_linear")}
    if kind == "none" or (kind == "linear" and factor in (0, 1) and odd.keys() <= set(OF_YARN)):
        return None
    strange = [f"rope.scaling.{key} = {value}" for key, value in odd.items() if key not in TYPES.get(kind, ())]
    if kind not in TYPES or strange or not _is_factor(factor):
        what = ", ".join([f"rope.scaling.type = {kind}", f"rope.scaling.factor = {factor}", *strange])
        raise CheckpointError(f"{file} asks for {what}, which transformers cannot be told exactly; {WAY_OUT}")
    rope: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    if kind == "linear":
        return rope
    if not isinstance(odd.get("original_context_length"), int):
        raise CheckpointError(f"{file} asks for yarn without rope.scaling.original_context_length; {WAY_OUT}")
    rope["original_max_position_embeddings"] = odd["original_context_length"]
    rope |= {name: float(odd[f"yarn_{name}"]) for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in odd}
    if "attn_factor" in odd:  # llama.cpp multiplies by it what transformers computes where it is not told
        rope["attention_factor"] = float(odd["attn_factor"]) * (1 + 0.1 * math.log(float(factor)))
    return rope


def _is_factor(factor: Any) -> bool:
    return isinstance(factor, (int, float)) and math.isfinite(factor) and factor >= 1


def _llama3_rope(file: Path, own: Mapping[str, Any], factors: torch.Tensor) -> dict[str, Any]:
    """The rope_parameters that give these factors; transformers ignores the tensor, which changes the model."""
    theta = own.get("rope_theta", 10000.0)
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max()), **LLAMA3_ROPE}
    half = len(factors)
    wavelengths = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    low, high, context = LLAMA3_ROPE.values()
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
    if not torch.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{file}: its rope_freqs are not those of Llama 3, and transformers has no place for them; {WAY_OUT}"
        )
    return rope
