"""What Python takes of a token on the processor, beside the compiled kernels of packed linears.

    python benchmarks/host_share.py ARTIFACT [--dtype float32 --dtype bfloat16]

Every packed linear of every layer is called as the model's code calls it, one token at a time; then the same kernels
with the same arguments, one after the other: "around" is the difference. It has a torch module's call and a result's
allocation in it, as every linear has: "plain" is as many nn.Linear of 1 x 1 in their place, between the same kernels.
"alone" is the packed linears with kernels that return at once. Processor time of one thread, the least of each layer
over the rounds, so that what else the machine does counts little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import processor, report
from torch import nn

from qpalette.evaluate import load_model

LINEARS = 7  # of a layer


class Kernel:
    """Stands in for a compiled kernel: calls it, notes its arguments, or does nothing."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = self.now = compiled

    def __call__(self, *arguments: int) -> None:
        self.now(*arguments)


def main(
    artifact: str,
    dtype: Annotated[list[str] | None, typer.Option()] = None,
    rounds: int = 40,
    name: str = "host_share",
) -> None:
    torch.set_num_threads(1)
    kernels = switchable_kernels()
    rows = [measured(artifact, each, kernels, rounds) for each in dtype or ["float32", "bfloat16"]]
    report(name, processor(), rows, artifact=Path(artifact).name, rounds=rounds)


def switchable_kernels() -> dict[Any, Kernel]:
    """From now on the backend prepares products with these: by the compiled kernel that each stands in for."""
    product: Any = import_module("qpalette.backends.cpu.product")
    original, found = product.multiplier_of, {}

    def multiplier_of(spec: str, in_bytes: bool) -> Any:
        multiplier = original(spec, in_bytes)
        return multiplier._replace(linear=found.setdefault(multiplier.linear, Kernel(multiplier.linear)))

    product.multiplier_of = multiplier_of
    return found


@torch.no_grad()
def measured(artifact: str, dtype: str, kernels: dict[Any, Kernel], rounds: int) -> dict[str, Any]:
    layers = load_model(artifact, dtype=getattr(torch, dtype))[0].model.layers
    calls = [called(layer, dtype) for layer in layers]
    launches = [recorded(call, kernels) for call in calls]
    replays = [lambda each=each: replay(each) for each in launches]
    plain = [small_linears(each) for each in launches]
    tasks = {"linears": calls, "kernels": replays, "plain": plain, "alone": calls}
    best = {task: [float("inf")] * len(layers) for task in tasks}
    for _ in range(rounds):
        for task, work in tasks.items():
            for kernel in kernels.values():
                kernel.now = nothing if task == "alone" else kernel.compiled
            best[task] = [min(least, seconds(each)) for least, each in zip(best[task], work, strict=True)]
    linears, compiled, small, alone = (sum(best[task]) * 1e3 for task in tasks)
    around, count = linears - compiled, LINEARS * len(layers)
    return {
        "type": dtype,
        "launches": sum(map(len, launches)),
        "linears ms/token": linears,
        "kernels ms/token": compiled,
        "around ms/token": around,
        "around us/linear": around / count * 1e3,
        "plain ms/token": small - compiled,
        "alone ms/token": alone,
    }


def called(layer: Any, dtype: str) -> Callable[[], None]:
    """Every linear of a layer, siblings with one input. The results stay until the next call: kernels that are called
    once more write there."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden, mixed, normed, inner = (
        torch.randn(1, 1, linear.in_features, dtype=getattr(torch, dtype))
        for linear in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
    )

    kept: list[torch.Tensor] = []

    def run() -> None:
        kept[:] = (
            *(attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden), attention.o_proj(mixed)),
            *(mlp.gate_proj(normed), mlp.up_proj(normed), mlp.down_proj(inner)),
        )

    return run


Launches = list[tuple[Any, tuple[int, ...]]]


def recorded(call: Callable[[], None], kernels: dict[Any, Kernel]) -> Launches:
    """What is prepared is prepared, then the compiled kernels that `call` starts, with their arguments."""
    call()
    launches: Launches = []
    for kernel in kernels.values():
        kernel.now = lambda *arguments, compiled=kernel.compiled: launches.append((compiled, arguments))
    call()
    for kernel in kernels.values():
        kernel.now = kernel.compiled
    return launches


def small_linears(launches: Launches) -> Callable[[], None]:
    """A layer's kernels, each after its share of as many plain linears as the layer has."""
    linears, x = [nn.Linear(1, 1, bias=False) for _ in range(LINEARS)], torch.zeros(1, 1, 1)

    def run() -> None:
        for index, (compiled, arguments) in enumerate(launches):
            for linear in linears[index :: len(launches)]:
                linear(x)
            compiled(*arguments)

    return run


def replay(launches: Launches) -> None:
    for compiled, arguments in launches:
        compiled(*arguments)


def nothing(*arguments: int) -> None:
    """In place of a kernel."""


def seconds(run: Callable[[], None]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


if __name__ == "__main__":
    typer.run(main)
