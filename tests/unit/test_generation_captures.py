"""Captures that fail, and steps that are compiled beside the generation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from generation_cases import GREEDY, Replay, build, prompt, sessions_of, short_caches

from qpalette.generation import attach, compilation

__all__ = ["short_caches"]

pytestmark = pytest.mark.usefixtures("one_thread", "short_caches")


def test_a_step_that_cannot_be_captured_runs_eagerly(caplog):
    def refuse(work: Callable[[], None]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = build()
    wanted = model.generate(prompt(1, 20), **GREEDY)
    attach(model, "never", refuse)
    for _ in range(2):
        assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)
    assert [record.getMessage() for record in caplog.records if "captured" in record.message] == [
        "a step of this model cannot be captured, so it runs eagerly: operation not permitted when stream is capturing"
    ]


@pytest.fixture
def traced(monkeypatch) -> Iterator[list[int]]:
    """Steps traced by torch.compile and run as graphs of plain operators; how often each was."""
    counts: list[int] = []

    def backend(graph, inputs):
        counts.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(
        compilation, "compiled", lambda step: torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    )
    torch._dynamo.reset()
    yield counts
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["background", "now"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_compiled_step_is_taken_up(mode, kind, traced):
    Replay.made = 0
    model = build(kind)
    wanted = {batch: model.generate(prompt(batch, 20), **GREEDY) for batch in (1, 2)}
    generate = attach(model, mode, Replay)
    for batch in (1, 2, 1):
        for _ in range(2):
            assert torch.equal(model.generate(prompt(batch, 20), **GREEDY), wanted[batch])
            generate.wait()
        steps = [step for session in sessions_of(model) for step in session.steps.values()]
        assert all(step.is_compiled and step.graph is not None for step in steps)
    assert not generate.loop.compiler.failed
    assert len(traced) == 2, "one sequence, and any other number"
    assert Replay.made == (4 if mode == "background" else 2)


def test_compiling_takes_nothing_of_the_seed(traced):
    model = build()
    generate = attach(model, "now", Replay)
    drawn = []
    for _ in range(2):  # the first compiles
        torch.manual_seed(3)
        drawn.append(model.generate(prompt(1, 20), do_sample=True, top_k=7, max_new_tokens=20, pad_token_id=0))
    assert len(traced) == 1
    assert not generate.loop.compiler.failed
    assert torch.equal(*drawn)


def test_longer_caches_take_the_compiled_step_as_it_is(traced):
    model = build()
    fresh = build()
    generate = attach(model, "now", Replay)
    for tokens in (8, 50, 90, 130):
        assert torch.equal(model.generate(prompt(1, tokens), **GREEDY), fresh.generate(prompt(1, tokens), **GREEDY))
    assert len(traced) == 1
    assert not generate.loop.compiler.failed


@pytest.mark.parametrize("where", ["compiling", "first run"])
def test_a_compilation_that_fails_is_told_once(where, monkeypatch, caplog):
    calls = []

    def compiled(step):
        def function(inputs):
            calls.append(1)
            if where == "compiling" or len(calls) > 2:
                inputs.cache.layers[0].cumulative_length.add_(1)  # a step that broke off in its first layer
                raise RuntimeError("no such kernel")
            return step(inputs)

        return function

    monkeypatch.setattr(compilation, "compiled", compiled)
    model = build()
    wanted = model.generate(prompt(1, 20), **GREEDY)
    generate = attach(model, "background", Replay)
    for _ in range(3):
        assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)
        generate.wait()
    told = [record.getMessage() for record in caplog.records if "compiled" in record.message]
    assert told == ["a step cannot be compiled and runs without (RuntimeError: no such kernel)"]


def test_a_process_that_ends_stops_compiling(monkeypatch):
    """Python's own end would meet the thread in the compiler's C++ code, and abort."""
    started = threading.Event()

    def compiled(step):
        def function(inputs):
            started.set()
            while True:
                started.wait(0.01)

        return function

    monkeypatch.setattr(compilation, "compiled", compiled)
    model = build()
    generate = attach(model, "background", Replay)
    wanted = build().generate(prompt(1, 20), **GREEDY)
    assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted), "nobody waits for a compilation"
    assert started.wait(60)
    assert generate.loop.compiler.busy
    compilation._stop()
    assert not generate.loop.compiler.busy
    assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)
