"""What others do with a cache, so that one command measures all of it: values as they would be read back, bits counted.

Nothing is stored here: tokens are quantized as they come, and kept as floats. Sources: q8_0, q4_0 of llama.cpp (ggml),
its keys rotated as it does since 2026; KIVI (Liu et al., ICML 2024), its residual window of 32 tokens; TurboQuant
(Zandieh et al., 2025) as vLLM has it, "3bit_nc" and "4bit_nc"; exllamav3's cache; NVFP4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from qpalette.core.errors import InputError, SpecError
from qpalette.kvcache import WHITE, parse_cache, parse_code
from qpalette.kvcache.codes import look_up, nearest
from qpalette.kvcache.transform import mixing
from qpalette.nn.coded_cache import check_cacheable
from qpalette.rotate import Rotation

GROUP, KIVI_WINDOW, NVFP4_GROUP = 32, 32, 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Quantize = Callable[[Tensor], Tensor]
"""float32 [batch, heads, tokens, dim] -> the same, as it is read back."""


@dataclass(frozen=True)
class Baseline:
    """How keys and values are read back.

    window: the newest tokens, at most so many, are read exactly, and quantized together; 0: none.
    """

    key: Quantize
    value: Quantize
    bits: Callable[[int], tuple[Fraction, Fraction]]  # dim -> stored bits per number of keys and values
    window: int = 0


class BaselineLayer(DynamicLayer):
    is_croppable = False

    def __init__(self, baseline: Baseline, sinks: int) -> None:
        super().__init__()
        self.baseline, self.sinks = baseline, sinks

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All tokens: those before as they are read back, these too, unless they are the window's."""
        before = self.get_seq_length()
        keys, values = super().update(
            self._coded(self.baseline.key, key_states, before), self._coded(self.baseline.value, value_states, before)
        )
        if not self.baseline.window:
            return keys, values
        return torch.cat([keys[:, :, :before], key_states], -2), torch.cat([values[:, :, :before], value_states], -2)

    def _coded(self, quantize: Quantize, states: Tensor, before: int) -> Tensor:
        coded = quantize(states.float()).to(states.dtype)
        exact = max(0, self.sinks - before)
        return torch.cat([states[:, :, :exact], coded[:, :, exact:]], -2)


class BaselineCache(Cache):
    """One window of text for a model with this `config`; `feed` tokens must come at a time, None: any number."""

    layers: list[BaselineLayer]  # type: ignore[assignment]  # transformers allows more

    def __init__(self, config: Any, baseline: Baseline, sinks: int) -> None:
        super().__init__(layers=[BaselineLayer(baseline, sinks) for _ in range(check_cacheable(config))])
        self.baseline = baseline
        self.feed = baseline.window or None

    @property
    def bits(self) -> Fraction:
        """Stored bits per cached number; known from the first tokens on."""
        total = numbers = Fraction(0)
        for layer in self.layers:
            for place, states in enumerate((layer.keys, layer.values)):
                assert states is not None
                dim, heads = states.shape[-1], states.shape[1]
                total += heads * dim * self.baseline.bits(dim)[place]
                numbers += heads * dim
        return total / numbers


def parse_baseline(text: str) -> tuple[Baseline, int] | None:
    """The baseline that "q4_0" or "kivi-2,sinks=4" names, and how many first tokens are exact; None for any other text.
    Raises SpecError for sinks that are no number."""
    name, _, option = text.partition(",")
    if name not in BASELINES:
        return None
    if not option:
        return BASELINES[name], 0
    if not option.startswith("sinks="):
        raise SpecError(f"'{text[:60]}': after the name of a baseline comes sinks=N or nothing")
    return BASELINES[name], parse_cache(f"{WHITE}:nuq-4,{option}").exact.sinks


def _rotated(quantize: Quantize, x: Tensor) -> Tensor:
    matrix = mixing(x.shape[-1]).to(x.device, x.dtype)
    return quantize(x @ matrix.mT) @ matrix


def _grouped(quantize: Quantize, size: int, x: Tensor) -> Tensor:
    """`quantize` sees groups of `size` neighbours of a vector, in a last dimension of their own."""
    if x.shape[-1] % size:
        raise InputError(f"this baseline has groups of {size} numbers, and heads have {x.shape[-1]}")
    return quantize(x.unflatten(-1, (-1, size))).flatten(-2)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def _q8_0(x: Tensor) -> Tensor:
    scale = _half(x.abs().amax(-1, keepdim=True) / 127)
    return torch.where(scale == 0, 0.0, (x / scale).round()).clamp(-127, 127) * scale


def _q4_0(x: Tensor) -> Tensor:
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = _half(largest / -8)
    return torch.where(scale == 0, 0.0, (x / scale).round().clamp(-8, 7)) * scale


def _min_max(bits: int, x: Tensor, dim: int = -1) -> Tensor:
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, zero = _half((high - low) / (2**bits - 1)), _half(low)
    return torch.where(scale == 0, 0.0, ((x - zero) / scale).round().clamp(0, 2**bits - 1)) * scale + zero


def _kivi_keys(bits: int, x: Tensor) -> Tensor:
    """Each channel alone, over the tokens that come together."""
    return _min_max(bits, x, dim=-2)


def _normed(bits: int, x: Tensor) -> Tensor:
    """Lloyd-Max levels, the norm in 16 bits, corrected for what the levels' norm is."""
    points = parse_code(f"nuq-{bits}").points(x.device)
    norm = x.norm(dim=-1, keepdim=True)
    unit = x / norm.clamp(min=torch.finfo(torch.float32).tiny) * x.shape[-1] ** 0.5
    levels = look_up(nearest(unit, points), points)
    return levels * _half(norm / levels.norm(dim=-1, keepdim=True))


def _absmax(bits: int, x: Tensor) -> Tensor:
    """Rotated in groups of 32, 2^bits cells between the largest and its opposite."""
    matrix = torch.from_numpy(Rotation.parse(f"h{GROUP}", GROUP).factors[0].matrix()).to(x.device, x.dtype)
    y = x @ matrix.mT
    scale = _half(y.abs().amax(-1, keepdim=True))
    half = 2 ** (bits - 1)
    cell = (y / scale.clamp(min=1e-30) * half).floor().clamp(-half, half - 1)
    return ((cell + 0.5) / half * scale) @ matrix


def _nvfp4(x: Tensor) -> Tensor:
    levels = torch.tensor(E2M1, device=x.device)
    scale = _fp8(x.abs().amax(-1, keepdim=True) / E2M1[-1])
    size = x.abs() / torch.where(scale == 0, 1.0, scale)
    return levels[torch.bucketize(size.contiguous(), (levels[1:] + levels[:-1]) / 2)] * scale * x.sign()


def _flat(bits: str) -> Callable[[int], tuple[Fraction, Fraction]]:
    return lambda dim: (Fraction(bits), Fraction(bits))


def _alike(quantize: Quantize, bits: str) -> Baseline:
    return Baseline(quantize, quantize, _flat(bits))


def _kivi(bits: int) -> Baseline:
    values = partial(_grouped, partial(_min_max, bits), GROUP)
    return Baseline(partial(_kivi_keys, bits), values, _flat(str(bits + 1)), KIVI_WINDOW)


def _turboquant(bits: int) -> Baseline:
    keys = partial(_rotated, partial(_normed, bits))
    return Baseline(keys, partial(_min_max, bits), lambda d: (bits + Fraction(16, d), bits + Fraction(32, d)))


BASELINES = {
    "fp8": _alike(_fp8, "8"),
    "q8_0": _alike(partial(_grouped, _q8_0, GROUP), "8.5"),
    "q4_0": _alike(partial(_rotated, partial(_grouped, _q4_0, GROUP)), "4.5"),
    "q4_0-plain": _alike(partial(_grouped, _q4_0, GROUP), "4.5"),
    "nvfp4": _alike(partial(_grouped, _nvfp4, NVFP4_GROUP), "4.5"),
    **{f"kivi-{bits}": _kivi(bits) for bits in (2, 4)},
    **{f"turboquant-{bits}": _turboquant(bits) for bits in (3, 4)},
    **{f"exl3-{bits}": _alike(partial(_grouped, partial(_absmax, bits), GROUP), f"{bits}.5") for bits in (2, 3, 4)},
}
