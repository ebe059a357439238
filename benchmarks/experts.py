"""A layer of experts on this processor: all of them as one operator, and called one by one, interleaved in one run.

    python benchmarks/experts.py [--experts 128] [--hidden 64] [--inner 48] [--ranks 8] [--spec nuq-4]

At sizes so small that products cost nothing, what is left is the cost of calling them. The module is the QuantExperts
that takes the place of Qwen3-MoE's; its codes are random and its routes uniform. Times are medians: on a machine that
does other things, too, only their ratio says something.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from report import processor, report
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qpalette.core.records import LinearRecord
from qpalette.formats.parts import parts_of
from qpalette.models.resolver import Place
from qpalette.nn import PackedModule, QuantExperts
from qpalette.rotate import rotation_for
from qpalette.runtime import in_runs

PLACES = {
    "0.gate_proj": Place("experts", "gate_up_proj", 0, 0, 2),
    "0.up_proj": Place("experts", "gate_up_proj", 0, 1, 2),
}
PLACES |= {"0.down_proj": Place("experts", "down_proj", 0)}


def random_layer(experts: int, hidden: int, inner: int, spec: str) -> QuantExperts:
    config: Any = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner)
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    records = {
        f"{index}.{leaf}": LinearRecord(
            spec, *shape, rotation_for(shape[1], "full").name, 0, f"{index}.down" if leaf == "down_proj" else "first"
        )
        for index in range(experts)
        for leaf, shape in shapes.items()
    }
    layer = QuantExperts(Qwen3MoeExperts(config), records, PLACES)
    for module in layer.modules():
        if isinstance(module, PackedModule):
            for part in parts_of(module.record):
                module.get_buffer(part.suffix).copy_(part.random(module.record, torch.device("cpu")))
            module.prepare()
    return layer


def microseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def main(
    experts: Annotated[int, typer.Option()] = 128,
    hidden: Annotated[int, typer.Option()] = 64,
    inner: Annotated[int, typer.Option()] = 48,
    ranks: Annotated[int, typer.Option(help="experts of a token")] = 8,
    spec: Annotated[str, typer.Option()] = "nuq-4",
    rounds: Annotated[int, typer.Option()] = 100,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """Prints a row for each number of tokens and writes benchmarks/results/experts.json."""
    torch.set_num_threads(threads)
    layer, rows = random_layer(experts, hidden, inner, spec), []
    for tokens in (1, 4, 16, 64, 256):
        x = torch.randn(tokens, hidden)
        routes = torch.stack([torch.randperm(experts)[:ranks] for _ in range(tokens)])
        weights = torch.full((tokens, ranks), 1 / ranks)
        ways = {
            "operator": partial(layer, x, routes, weights),
            "one by one": partial(in_runs, x, routes, weights, experts, layer._run),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            for run in ways.values():
                run()
            for _ in range(max(5, rounds // tokens)):
                for name, run in ways.items():
                    times[name].append(microseconds(run))
        medians = {f"{name}, us": statistics.median(each) for name, each in times.items()}
        ratio = medians["one by one, us"] / medians["operator, us"]
        touched = int(routes.unique().numel())
        rows.append({"tokens": tokens, "experts touched": touched, **medians, "ratio": ratio})
    report("experts", processor(), rows, experts=experts, hidden=hidden, inner=inner, ranks=ranks, spec=spec)


if __name__ == "__main__":
    typer.run(main)
