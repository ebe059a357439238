"""Prompts that wait together are read at once, and leave what each would leave alone."""

from __future__ import annotations

import random

import pytest
import torch
from generation_cases import GREEDY, MAKERS, Puts, build, prompt
from test_batched_generation import all_at_once
from transformers import DynamicCache

from qpalette.generation import attach, together
from qpalette.generation.together import MOST, WORTH, read_together, readings

pytestmark = pytest.mark.usefixtures("one_thread")
SLOTS = 4


def alone(model, ids: torch.Tensor) -> list:
    """Keys and values of each layer for all tokens but the last, [heads, tokens, width]."""
    cache = DynamicCache()
    if len(ids) > 1:
        model(input_ids=ids[None, :-1], past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def like(kind: str) -> dict:
    """What transformers prepares for these classes."""
    return {"logits_to_keep": 1} | ({} if kind == "bloom" else {"position_ids": torch.zeros(1, 1, dtype=torch.int64)})


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_each_prompt_is_read_as_alone(kind):
    """In float64: a padding token that is looked at, a position or a window that is off, is far more than rounding."""
    model = build(kind).double()
    lengths = [*random.Random(kind).choices(range(2, 40), k=5), 1, 2]
    common = prompt(1, 17, seed=3)[0]
    for shared in (0, 17):
        prompts = [torch.cat([common[:shared], prompt(1, length, seed=length)[0]]) for length in lengths]
        columns = None if shared == 0 else (shared, alone(model, torch.cat([common, common[:1]])))
        read = read_together(model, prompts, like(kind), columns)
        assert [length for length, _ in read] == [len(ids) - 1 for ids in prompts]
        for ids, (_, layers) in zip(prompts, read, strict=True):
            for one, other in zip(layers, alone(model, ids), strict=len(ids) > 1):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_readings_waste_little_and_leave_nobody_out():
    chooser = random.Random(0)
    for _ in range(300):
        lengths = [chooser.choice([1, 20, 60, 300, 3000]) + chooser.randrange(40) for _ in range(chooser.randint(1, 9))]
        found = list(readings(range(len(lengths)), lengths))
        assert sorted(index for reading in found for index in reading) == list(range(len(lengths)))
        longest = [max(lengths[index] for index in reading) for reading in found]
        assert longest == sorted(longest)
        for reading, most in zip(found, longest, strict=True):
            assert len(reading) == 1 or len(reading) * most <= MOST
            assert sum(most - lengths[index] for index in reading) <= WORTH * (len(reading) - 1)
    assert list(readings(range(3), [70, 10, 69])) == [[1, 2, 0]]


def requests_of(*prompts: torch.Tensor) -> list[dict]:
    return [{"input_ids": ids, **GREEDY} for ids in prompts]


def watched(model) -> list[tuple[int, ...]]:
    """The shape of every prompt that is read from now on."""
    shapes: list[tuple[int, ...]] = []

    def note(module, args, given) -> None:
        ids = given["input_ids"]
        if ids.shape[1] > 1:
            shapes.append(tuple(ids.shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def test_those_that_wait_are_read_once_without_what_they_share():
    """The first says whether the class can read into a static cache: it is read alone."""
    model = build()
    system = prompt(1, 30)
    requests = requests_of(*(torch.cat([system, prompt(1, 6 + row, seed=row)], dim=1) for row in range(4)))
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", None, slots=SLOTS)
    shapes = watched(model)
    assert all(map(torch.equal, all_at_once(model, requests), wanted))
    assert shapes[0][0] == 1
    assert len(shapes) == 2
    assert shapes[1][0] == 3
    assert shapes[1][1] <= 9, "what is shared was read again"


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), ValueError("broken")])
def test_what_cannot_be_read_together_is_read_one_by_one(monkeypatch, error):
    model = build()
    requests = requests_of(*(prompt(1, 6 + row, seed=row) for row in range(6)))
    wanted, streamers = [model.generate(**request) for request in requests], [Puts() for _ in requests]
    attach(model, "never", None, slots=SLOTS)
    asked = []

    def refuse(*given) -> None:
        asked.append(given)
        raise error

    monkeypatch.setattr("qpalette.generation.batch.read_together", refuse)
    given = [request | {"streamer": streamer} for request, streamer in zip(requests, streamers, strict=True)]
    assert all(map(torch.equal, all_at_once(model, given), wanted))
    assert len(asked) == 1, "what failed once is not tried with each that comes"
    assert all(len(streamer.puts) == 25 for streamer in streamers), "the prompt and each token, once"
    assert together.read_together is not refuse
