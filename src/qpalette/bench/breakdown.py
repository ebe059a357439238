"""Where the time of a decode step goes: the device's own record of its kernels, sorted by what they are for."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from qpalette.bench.decode import PROFILED, Decoder, greedy
from qpalette.nn import QuantLinear

PARTS = ("linears", "rotation", "lm_head", "attention", "norms", "other", "gaps")
# (what a kernel's name looks like, part), first match wins. Fused kernels of torch.compile name the operators in them.
KERNELS = (
    (re.compile(r"^rotate\b|hadamard", re.I), "rotation"),
    (re.compile(r"^(multiply|unpack)\b"), "linears"),  # this package's own
    (re.compile(r"^attend\b|flash|fmha|attention|attn|softmax|index_copy|index_put|sdpa", re.I), "attention"),
    (re.compile(r"gemm|gemv|cutlass|cublas|nvjet|splitk|dot_kernel|reduce_1Block|triton_tem|_mm_", re.I), "linears"),
    (re.compile(r"norm|rsqrt|mean_pow|pow_mean", re.I), "norms"),
    (re.compile(r"triton.*(cos|sin|repeat|expand|where|bitwise_and|_le_|ge_scalar)", re.I), "attention"),
)


class Kernel(NamedTuple):
    """One launch, in seconds on the device's clock."""

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Share:
    """What one part of the model takes of a step."""

    part: str
    seconds: float  # per step
    kernels: dict[str, float] = field(default_factory=dict)  # name -> seconds per step, the longest ones


def breakdown(decoder: Decoder) -> list[Share]:
    """Time of each part per step, in the order of PARTS; they sum to the step's time.

    On a CUDA device, kernels as they ran, by name; "gaps" is when none ran. On a CPU, the modules' own time in eager
    mode; a rotation is inside its linear there.
    """
    decoder._wait()
    if decoder.device.type == "cuda":
        kernels, seconds = _profile(decoder)
        return shares_of(kernels, seconds, PROFILED)
    return _by_module(decoder)


def shares_of(kernels: Sequence[Kernel], seconds: float, steps: int) -> list[Share]:
    """`kernels` of `steps` steps that took `seconds` together, sorted into parts."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    parts = [part_of(kernel.name) for kernel in ordered]
    _mark_head(ordered, parts, steps)
    by_part: dict[str, dict[str, float]] = {part: defaultdict(float) for part in PARTS}
    alone = _time_alone(ordered)
    for kernel, part, own in zip(ordered, parts, alone, strict=True):
        by_part[part][kernel.name] += own / steps
    by_part["gaps"]["(no kernel ran)"] = max(0.0, seconds - sum(alone)) / steps
    return [Share(part, sum(names.values()), _longest(names)) for part, names in by_part.items()]


@lru_cache(maxsize=4096)  # names of templates run to thousands of characters, and come back at every layer and step
def part_of(name: str) -> str:
    """The part that a kernel of this name belongs to; the head's product looks like any other linear's."""
    return next((part for pattern, part in KERNELS if pattern.search(name)), "other")


def _mark_head(kernels: Sequence[Kernel], parts: list[str], steps: int) -> None:
    """The head's product is the last run of linears in a step: behind it only the choice of the token follows."""
    per_step = len(kernels) // steps
    if not per_step or len(kernels) % steps:
        return  # steps that differ in kernels cannot be told apart
    for end in range(per_step, len(kernels) + 1, per_step):
        place = end - 1
        while place >= end - per_step and parts[place] not in ("linears", "rotation"):
            place -= 1
        while place >= end - per_step and parts[place] == "linears":
            parts[place] = "lm_head"
            place -= 1


def _time_alone(kernels: Sequence[Kernel]) -> list[float]:
    """Seconds of each kernel after the earlier ones have ended.

    A dependent launch starts early, and waits: that time belongs to the kernel that it waits for.
    """
    alone, until = [], float("-inf")
    for kernel in kernels:
        end = kernel.start + kernel.seconds
        alone.append(max(0.0, end - max(kernel.start, until)))
        until = max(until, end)
    return alone


def _longest(names: dict[str, float], count: int = 6) -> dict[str, float]:
    return dict(sorted(names.items(), key=lambda item: -item[1])[:count])


def _profile(decoder: Decoder) -> tuple[list[Kernel], float]:
    """The kernels of PROFILED steps, and the time from the first one's start to the last one's end."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            decoder.step()
        torch.cuda.synchronize()
    kernels = [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in recorded.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not kernels:
        return [], 0.0
    start = min(kernel.start for kernel in kernels)
    return kernels, max(kernel.start + kernel.seconds for kernel in kernels) - start


def _by_module(decoder: Decoder) -> list[Share]:
    spent: dict[str, float] = defaultdict(float)
    decoder.next_token = partial(greedy, decoder.model)
    with _timed_modules(decoder.model, spent):
        start = time.perf_counter()
        for _ in range(PROFILED):
            decoder.step()
        total = time.perf_counter() - start
    parts = {part: spent[part] / PROFILED for part in PARTS}
    parts["other"] = total / PROFILED - sum(parts.values())
    return [Share(part, seconds) for part, seconds in parts.items()]


@contextmanager
def _timed_modules(model: Any, spent: dict[str, float]) -> Iterator[None]:
    """Adds each module's own time to its part; a module inside another is taken out of the outer one."""
    stack: list[list[float]] = []  # start, seconds of inner modules

    def enter(module: Any, arguments: Any) -> None:
        stack.append([time.perf_counter(), 0.0])

    def leave(part: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            start, inner = stack.pop()
            seconds = time.perf_counter() - start
            spent[part] += seconds - inner
            if stack:
                stack[-1][1] += seconds

        return hook

    handles = []
    for name, module in model.named_modules():
        part = _module_part(name, module)
        if part is not None:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave(part))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module_part(name: str, module: Any) -> str | None:
    last = name.rpartition(".")[2]
    if last == "lm_head":
        return "lm_head"
    if isinstance(module, (torch.nn.Linear, QuantLinear)):
        return "linears"
    if "norm" in last:
        return "norms"
    return "attention" if re.fullmatch(r"(self_)?attn|attention", last) else None
