"""A token step on the CPU through `model.generate`: transformers' loop, our loop with eager steps, and with programs.

    python benchmarks/cpu_step.py MODEL [MODEL ...] [--dtype float32 --dtype bfloat16]
    python benchmarks/cpu_step.py MODEL --batch 1 --batch 8 [--threads 1] [--name cpu_batch]

Requests of the three take turns in one process, on one thread; what counts is the lower quartile of its processor time
between tokens, as a streamer sees it, so that what else the machine does counts little. "replay" is a program alone,
"products" its packed products alone, on the same memory: "all else" is the difference: norms, rope, attention,
activations, the choice of the token. "Python" is what a token takes beside its replay.

With --batch: milliseconds of replays alone, of steps of several sequences, which take turns; whole ones, and their
kernels one by one in their places. Lower quartiles, of processor time on one thread, of passing time on more.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import commit, processor, report
from transformers.generation.streamers import BaseStreamer

from qpalette.backends.cpu.jit import name_of
from qpalette.backends.cpu.step import Instruction, Program, instructions_of
from qpalette.backends.cpu.step.native import Native
from qpalette.backends.cpu.step.packed import Packed, Rows
from qpalette.core.environment import CPU_BYTES
from qpalette.evaluate import load_model
from qpalette.generation import Generate, fast
from qpalette.generation.native import ProgramCapture

SKIPPED = 10  # tokens until a step is warm
Runner = Callable[..., Any]


def main(
    models: list[str],
    dtype: Annotated[list[str] | None, typer.Option()] = None,
    context: int = 32,
    steps: int = 64,
    rounds: int = 6,
    batch: Annotated[list[int] | None, typer.Option()] = None,
    threads: int = 1,
    name: str = "cpu_step",
) -> None:
    os.environ.setdefault(CPU_BYTES, "1")  # as the commands do
    torch.set_num_threads(threads if batch else 1)
    rows = []
    for model in models:
        for each in dtype or ["float32", "bfloat16"]:
            facts = {"model": Path(model).name, "type": each}
            if batch:
                rows += [facts | row for row in by_kernel(model, each, batch, context, rounds)]
            else:
                rows.append(facts | measured(model, each, context, steps, rounds))
            gc.collect()
    load = os.getloadavg()[0]
    report(name, processor(), rows, commit=commit(), context=context, steps=steps, rounds=rounds, load=load)


def measured(path: str, dtype: str, context: int, steps: int, rounds: int) -> dict[str, Any]:
    original, model = (load_model(path, dtype=getattr(torch, dtype))[0] for _ in range(2))
    fast(model)  # with the attention that it chooses
    capture = ProgramCapture()
    program = Generate(model, "never", capture)
    plain = type(original).generate.__get__(original)
    runners: dict[str, Runner] = {"transformers": plain, "eager": Generate(model, "never", None), "program": program}
    prompt = torch.randint(3, model.config.vocab_size, (1, context))
    for run in runners.values():
        times(run, prompt, SKIPPED)
    capture.wait()
    found: dict[str, list[float]] = {runner: [] for runner in runners}
    for _ in range(rounds):
        for runner, run in runners.items():
            found[runner] += times(run, prompt, steps)
    milliseconds = {runner: quartile(each) for runner, each in found.items()}
    replay, products = alone(program, rounds * steps // 4)
    return {
        "prompt": context,
        **{f"{runner} ms/token": each for runner, each in milliseconds.items()},
        "program tokens/s": 1e3 / milliseconds["program"],
        "over eager": milliseconds["eager"] / milliseconds["program"],
        "over transformers": milliseconds["transformers"] / milliseconds["program"],
        "replay ms": replay,
        "products ms": products,
        "all else ms": replay - products,
        "Python ms": milliseconds["program"] - replay,
    }


@torch.no_grad()
def by_kernel(path: str, dtype: str, batches: list[int], context: int, rounds: int) -> list[dict[str, Any]]:
    model = fast(load_model(path, dtype=getattr(torch, dtype))[0])  # with the attention that it chooses
    capture = ProgramCapture()
    generate = Generate(model, "never", capture)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    replays = []
    for batch in batches:
        prompt = torch.randint(3, model.config.vocab_size, (batch, context))
        for _ in range(2):  # the first compiles
            times(generate, prompt, SKIPPED)
            capture.wait()
        assert generate.loop is not None
        session = next(each for each in generate.loop.sessions if each.batch == batch)
        instructions = instructions_of(next(iter(session.steps.values())).run)
        replays.append(_Replay(session, instructions, Program(instructions), Program(instructions, apart=True)))
    for _ in range(rounds):
        for replay in replays:
            replay.measure(clock)
    found = {f"batch {replay.session.batch}": replay.milliseconds() for replay in replays}
    whats = sorted(next(reversed(found.values())).items(), key=lambda each: -each[1])
    return [{"what": what} | {batch: each.get(what, 0.0) for batch, each in found.items()} for what, _ in whats]


@dataclass
class _Replay:
    session: Any
    instructions: list[Instruction]
    whole: Program
    apart: Program
    found: list[float] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)

    def measure(self, clock: Callable[[], float]) -> None:
        for program in (self.whole, self.apart):
            self.session.inputs.cache.set_length(self.session.used - 1)
            moments = [clock()]
            for part in program.parts:
                part()
                moments.append(clock())
            if program is self.whole:
                self.found.append(moments[-1] - moments[0])
            else:
                self.parts.append([later - before for before, later in pairwise(moments)])

    def milliseconds(self) -> dict[str, float]:
        """Of the whole step, and of each kind of kernel."""
        kinds = {"whole step": quartile(self.found)}
        for instruction, seconds in zip(self.instructions, zip(*self.parts, strict=True), strict=True):
            kind = _kind(instruction)
            kinds[kind] = kinds.get(kind, 0.0) + quartile(list(seconds))
        return kinds


def _kind(instruction: Instruction) -> str:
    if isinstance(instruction, Packed):
        rows = sum(member.out_features for member in instruction.members)
        return f"product {rows}x{instruction.members[0].in_features}"
    if isinstance(instruction, Native):
        return name_of(instruction.kernel)
    return "embedding" if isinstance(instruction, Rows) else "torch"


def times(run: Runner, prompt: torch.Tensor, steps: int) -> list[float]:
    """Processor time between tokens, once the steps are warm."""
    streamer = _Times()
    run(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        streamer=streamer,
    )
    moments = streamer.moments[SKIPPED:]
    return [later - before for before, later in pairwise(moments)]


@torch.no_grad()
def alone(generate: Generate, rounds: int) -> tuple[float, float]:
    """ms of a whole step as a program, and of its packed products alone, from the same place in the cache."""
    assert generate.loop is not None
    session = next(iter(generate.loop.sessions))
    step = next(iter(session.steps.values()))
    instructions = instructions_of(step.run)
    packed = [each for each in instructions if isinstance(each, Packed)]
    programs = [Program(instructions), Program(packed)]
    found: list[list[float]] = [[], []]
    for _ in range(rounds):
        for program, each in zip(programs, found, strict=True):
            session.inputs.cache.set_length(session.used - 1)
            start = time.thread_time()
            program.replay()
            each.append(time.thread_time() - start)
    return quartile(found[0]), quartile(found[1]) if packed else 0.0


def quartile(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 4] * 1e3


class _Times(BaseStreamer):
    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.thread_time())

    def end(self) -> None:
        """The last token has come."""


if __name__ == "__main__":
    typer.run(main)
