"""Eager mode, as `model.generate()` runs a packed model: host time of a layer, tokens per second, prompts.

    python benchmarks/eager.py [--config llama-3.1-8b --config qwen3-8b] [--spec tcq2-3.25] [--device cuda]

Models of random weights, each beside its float16 original, in one run. "host" is the time until Python has started
everything, with nothing to wait for; "linears" the share of a layer's linears in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from report import device_name, report

from qpalette.backends.cuda.graphs import capture_graph
from qpalette.bench import from_config, read_config
from qpalette.bench.decode import Decoder, release
from qpalette.bench.models import groups_of
from qpalette.plan import Plan

ROUNDS, CALLS = 5, 12  # of each measurement: models take turns, as the host's speed drifts


def main(
    config: Annotated[list[str] | None, typer.Option()] = None,
    spec: str = "tcq2-3.25",
    context: int = 1024,
    device: str = "cuda",
    name: str = "eager",
) -> None:
    rows = []
    for model in config or ["llama-3.1-8b", "qwen3-8b"]:
        rows += measured(model, ["float16", spec], context, torch.device(device))
        release()
    report(name, device_name(device), rows, context=context)


@torch.no_grad()
def measured(name: str, weights: list[str], context: int, device: torch.device) -> list[dict[str, Any]]:
    models = {each: built(name, each, device) for each in weights}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for batch in (1, 8):
        tasks = {each: decode_tasks(model, batch, context) for each, model in models.items()}
        for each, samples in in_turns(tasks).items():
            layers = models[each].config.num_hidden_layers
            found[each, batch] = {
                "host us/layer": statistics.median(samples["host"]) / layers * 1e6,
                "linears us/layer": statistics.median(samples["linears"]) / layers * 1e6,
                "eager tokens/s": batch / statistics.median(samples["step"]),
            }
    prompts = {each: prompt_tasks(model, context) for each, model in models.items()}
    for each, samples in in_turns(prompts).items():
        found[each, 1] |= {f"prompt {task} ms": statistics.median(times) * 1e3 for task, times in samples.items()}
        found[each, 1]["prompt busy ms"] = busy_seconds(each, prompts[each]["eager"][0]) * 1e3
    return [
        {"model": name, "weights": each, "batch": batch} | found[each, batch] for each in weights for batch in (1, 8)
    ]


Task = tuple[Callable[[], object], bool]  # what to time, and whether the device's end is waited for


def built(name: str, weights: str, device: torch.device) -> Any:
    settings = read_config(name)
    names = [linear.name for group in groups_of(settings).groups for linear in group.linears]
    plan = None if weights == "float16" else Plan(dict.fromkeys(names, weights))
    return from_config(name, settings, plan, torch.float16, device, None).build()


def in_turns(tasks: dict[str, dict[str, Task]]) -> dict[str, dict[str, list[float]]]:
    """Seconds of every task of every model: some calls of each, then again."""
    samples: dict[str, dict[str, list[float]]] = {each: {task: [] for task in named} for each, named in tasks.items()}
    for _ in range(ROUNDS):
        for each, named in tasks.items():
            for task, (run, wait) in named.items():
                run()
                samples[each][task] += [seconds(run, wait) for _ in range(CALLS)]
    return samples


def seconds(run: Callable[[], object], wait: bool) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if wait:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def decode_tasks(model: Any, batch: int, context: int) -> dict[str, Task]:
    decoder = Decoder(model, batch, context, 2 * ROUNDS * (CALLS + 1))
    decoder.prefill()
    decoder.warm_up()
    step = decoder.step
    return {"host": (step, False), "step": (step, True), "linears": (lambda: run_linears(model, batch), False)}


def run_linears(model: Any, batch: int) -> None:
    """Every linear of every layer, siblings with one input, as the model calls them."""
    inputs: dict[int, torch.Tensor] = {}

    def shared(width: int) -> torch.Tensor:
        if width not in inputs:
            inputs[width] = torch.zeros(batch, 1, width, dtype=torch.float16, device=model.device)
        return inputs[width]

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        hidden, inner = shared(attention.q_proj.in_features), shared(mlp.down_proj.in_features)
        attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
        attention.o_proj(shared(attention.o_proj.in_features))
        mlp.gate_proj(hidden), mlp.up_proj(hidden)
        mlp.down_proj(inner)


def prompt_tasks(model: Any, context: int) -> dict[str, Task]:
    """A prompt until its first token: eager, and captured in a CUDA graph."""
    prompt = torch.randint(model.config.vocab_size, (1, context), device=model.device)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

    run()
    return {"eager": (run, True), "captured": (capture_graph(run).replay, True)}


def busy_seconds(name: str, run: Callable[[], object]) -> float:
    """Of all kernels together; the longest are printed."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    by_name: dict[str, float] = {}
    for event in recorded.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            by_name[event.name] = by_name.get(event.name, 0) + event.time_range.elapsed_us() / 1e6
    print(f"a prompt, {name}")
    for kernel, taken in sorted(by_name.items(), key=lambda item: -item[1])[:10]:
        print(f"{taken * 1e3:8.2f} ms  {kernel[:70]}")
    return sum(by_name.values())


if __name__ == "__main__":
    typer.run(main)
