"""Prompts are read by captured work of few shapes, and leave what each would leave alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from generation_cases import GREEDY, MAKERS, Programs, Puts, Replay, build, prompt, short_caches
from test_batched_generation import all_at_once
from test_prompts_together import alone, like, watched

from qpalette.generation import attach
from qpalette.generation.compilation import Compiler
from qpalette.generation.loop import Loop
from qpalette.generation.prompts import LEAST, MOST, shape_of
from qpalette.nn.token_cache import TokenCache

__all__ = ["short_caches"]
pytestmark = pytest.mark.usefixtures("one_thread")
SLOTS = 4


def loop_of(model, capture=Replay) -> Loop:
    return Loop(model, Compiler(model, "never", None), capture, TokenCache)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_each_prompt_is_read_as_alone(kind):
    """In float64, as in `test_prompts_together.py`; shapes come again with other prompts, in the memory of others."""
    model, chooser, before = build(kind).double(), random.Random(kind), Replay.made
    prompts = loop_of(model).prompts
    columns = alone(model, prompt(1, 2)[0])
    for turn in range(12):
        lengths = chooser.choices(range(1, 100), k=chooser.choice([1, 2, 3, 4]))
        ids = [prompt(1, length, seed=turn * 100 + length)[0] for length in lengths]
        read = prompts.read(ids, like(kind), columns)
        assert [length for length, _ in read] == [length - 1 for length in lengths]
        for each, (_, layers) in zip(ids, read, strict=True):
            for one, other in zip(layers, alone(model, each), strict=len(each) > 1):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert Replay.made > before, "none of the shapes came often enough to be captured"


def test_few_shapes_hold_all_prompts_and_no_position_is_beyond_the_context():
    chooser, shapes = random.Random(0), set()
    for _ in range(2000):
        lengths = [chooser.randint(1, 400) for _ in range(chooser.randint(1, 16))]
        shape = shape_of(lengths)
        if shape is None:
            assert 4 * len(lengths) * max(*lengths, LEAST) > MOST, "a power of two holds less than twice as many"
            continue
        shapes.add(shape)
        assert shape[0] >= len(lengths)
        assert shape[1] >= max(lengths)
        assert shape[0] * shape[1] <= MOST
    assert len(shapes) <= 12
    assert shape_of([90, 99], 100) == (2, 100)
    assert shape_of([10], 100) == (1, LEAST)


@torch.no_grad()
def test_all_shapes_share_one_memory():
    model = build()
    prompts = loop_of(model).prompts
    for lengths in ([5], [70], [9, 100], [3] * 7):
        read = prompts.read([prompt(1, length)[0] for length in lengths], like("llama"), alone(model, prompt(1, 2)[0]))
        addresses = {each.untyped_storage().data_ptr() for _, layers in read for both in layers for each in both}
        assert addresses == {each.data_ptr() for both in prompts.memory.numbers for each in both}


def test_prompts_are_not_made_programs_of():
    """A program's kernels are compiled for its shapes, on the processor that answers."""
    assert loop_of(build(), Programs()).prompts is None
    assert loop_of(build(), None).prompts is None


def test_one_that_comes_by_itself_and_several_are_read_in_shapes():
    model = build()
    requests = [{"input_ids": prompt(1, 6 + row, seed=row), **GREEDY} for row in range(8)]
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", Replay, slots=SLOTS)
    shapes = watched(model)
    for _ in range(3):
        assert all(map(torch.equal, all_at_once(model, requests), wanted))
    assert {shape[1] for shape in shapes if shape[0] > 1} == {LEAST}
    first = [shape for shape in shapes if shape[1] != LEAST]
    assert len(first) == 1, "only the first of all is read in a session of its own"


def test_a_prompt_of_no_shape_joins_all_the_same():
    model = build(max_position_embeddings=2048)
    requests = [{"input_ids": prompt(1, length, seed=length), **GREEDY} for length in (7, MOST + 60, 30, 500, 600)]
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", Replay, slots=SLOTS)
    assert all(map(torch.equal, all_at_once(model, requests), wanted))


def test_what_cannot_be_captured_is_read_eagerly_and_told_once(caplog):
    def refuse(work) -> None:
        raise RuntimeError("it waits for the host")

    model = build()
    requests = [{"input_ids": prompt(1, 6 + row, seed=row), **GREEDY} for row in range(8)]
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", refuse, slots=SLOTS)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            assert all(map(torch.equal, all_at_once(model, requests), wanted))
    assert [record.getMessage().count("it waits for the host") for record in caplog.records] == [1]
    readings = model.generate.loop.prompts.readings.values()
    assert any(reading.stays_eager for reading in readings)


class Ends(Puts):
    """After `at` tokens its client's connection breaks, or, where there is `leave`, nobody waits any more."""

    def __init__(self, at: int, leave: Callable[[Ends], None] | None = None) -> None:
        super().__init__()
        self.at, self.leave = at, leave

    def put(self, value) -> None:
        super().put(value)
        if len(self.puts) <= self.at + 1:  # the first is the prompt
            return
        if self.leave is None:
            raise ValueError("the connection broke")
        self.leave(self)


@pytest.mark.parametrize("seed", range(4))
def test_failures_and_cancellations_among_requests_that_join(seed, short_caches, monkeypatch):
    """Prompts of any length come at any time; a client in four breaks off, one in four leaves."""
    model, chooser, jobs = build(), random.Random(seed), {}
    requests = [
        {"input_ids": prompt(1, chooser.choice([2, 9, 40, 70, 130]), seed=row), **GREEDY}
        | {"max_new_tokens": chooser.randint(10, 60)}
        for row in range(24)
    ]
    wanted = [model.generate(**request) for request in requests]
    worker = attach(model, "never", Replay, slots=SLOTS).worker
    wait = worker._wait_for
    monkeypatch.setattr(worker, "_wait_for", lambda job: wait(jobs.setdefault(job.request.streamer, job)))
    ends = {0: None, 1: ValueError, 2: None, 3: InterruptedError}
    streamers = {1: Ends, 3: partial(Ends, leave=lambda streamer: jobs[streamer].left.set())}
    with ThreadPoolExecutor(6) as pool:
        answers = [
            pool.submit(model.generate, **request, streamer=streamers.get(row % 4, lambda at: Puts())(row % 7))
            for row, request in enumerate(requests)
        ]
    for row, (answer, right) in enumerate(zip(answers, wanted, strict=True)):
        assert ends[row % 4] in (None, type(answer.exception())), answer.exception()
        assert ends[row % 4] is not None or torch.equal(answer.result(), right)
