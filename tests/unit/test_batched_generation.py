"""Requests of several threads in one batch: each gets what it would get alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from generation_cases import GREEDY, MAKERS, Puts, build, capture, padded, prompt, short_caches, tokenizer
from transformers import BloomConfig, BloomForCausalLM

from qpalette.generation import attach
from qpalette.generation.batch import Batch

__all__ = ["capture", "short_caches", "tokenizer"]

KINDS = MAKERS | {
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, eos_token_id=None)
    )
}
pytestmark = pytest.mark.usefixtures("one_thread", "short_caches")
SLOTS = 4
LENGTHS = [9, 20, 3, 31, 14, 7, 25]  # more than slots


@contextmanager
def held(generate) -> Iterator[None]:
    """What is asked for within waits until the end."""
    free, taken = threading.Event(), threading.Event()
    thread = threading.Thread(target=generate.worker.alone, args=(lambda has_left: (taken.set(), free.wait(60)),))
    thread.start()
    taken.wait(60)
    yield
    free.set()
    thread.join()


def all_at_once(model, requests: list[dict]) -> list:
    """The answers, or what was raised, of as many threads."""
    pool = ThreadPoolExecutor(len(requests))
    with held(model.generate):
        answers = [pool.submit(model.generate, **request) for request in requests]
        while len(model.generate.worker._waiting) < len(requests):
            assert not any(answer.done() for answer in answers), [answer.exception() for answer in answers]
    pool.shutdown()
    return [answer.exception() or answer.result() for answer in answers]


def requests_of(lengths: list[int], **options) -> list[dict]:
    return [
        {"input_ids": prompt(1, length, seed=length), **GREEDY, "max_new_tokens": 20 + 9 * (row % 3), **options}
        for row, length in enumerate(lengths)
    ]


def sizes_of(model) -> set[int]:
    return {session.batch for session in model.generate.loop.batches}


def agree(got: list, wanted: list) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_gets_what_it_gets_alone(kind, capture):
    """Prompts longer and shorter than what is in the cache, and answers that outgrow it."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    requests = requests_of(LENGTHS)
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=SLOTS)
    for _ in range(2):  # the second time sessions are there
        assert agree(all_at_once(model, requests), wanted)
    assert SLOTS in sizes_of(model)


@pytest.mark.parametrize("kind", ["gpt2", "dynamic"])
def test_one_that_has_left_counts_no_further(kind, capture):
    """Beside a prompt that nearly fills the context others go on for longer than the context has columns left."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}  # of the highest position
    model = build(kind, n_positions=64) if kind == "gpt2" else build(max_position_embeddings=64, rope_scaling=dynamic)
    requests = requests_of([8, 58, 5], max_new_tokens=50)
    requests[1]["max_new_tokens"] = 4
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=SLOTS)
    assert agree(all_at_once(model, requests), wanted)


def test_a_batch_that_shrinks_is_laid_anew(capture):
    model = build()
    requests = requests_of([5] * 8, max_new_tokens=4) + requests_of([6], max_new_tokens=90)
    for number, request in enumerate(requests):
        request["input_ids"] = prompt(1, 5 + number % 3, seed=number)
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=16)
    assert agree(all_at_once(model, requests), wanted)
    assert {2, 16} <= sizes_of(model)


def test_one_that_comes_later_joins(capture):
    model = build()
    first, second = requests_of([12, 30])
    first["max_new_tokens"], second["max_new_tokens"] = 90, 6
    wanted = [model.generate(**request) for request in (first, second)]
    attach(model, "never", capture, slots=SLOTS)
    answers = {}

    class Asks(Puts):
        def put(self, value) -> None:
            super().put(value)
            if len(self.puts) == 8:
                asking.start()
                while not model.generate.worker._waiting:
                    pass

    def ask() -> None:
        answers["second"] = model.generate(**second)
        answers["written meanwhile"] = len(streamer.puts)

    streamer, asking = Asks(), threading.Thread(target=ask)
    answers["first"] = model.generate(**first, streamer=streamer)
    asking.join()
    assert agree([answers["first"], answers["second"]], wanted)
    assert answers["written meanwhile"] < 80, "the second did not wait for the first"


def test_each_is_chosen_by_its_own_processors(tokenizer, capture):
    model = build()
    requests = requests_of(LENGTHS[:6])
    requests[1] |= {"repetition_penalty": 1.7}
    requests[2] |= {"do_sample": True, "top_k": 1}  # a draw among one
    requests[3] |= {"min_new_tokens": 10, "eos_token_id": list(range(1, 60))}
    requests[4] |= {"eos_token_id": [5, 9, 14, 22, 40, 41, 60]}
    text = tokenizer.decode(model.generate(**requests[5])[0, LENGTHS[5] :])
    requests[5] |= {"stop_strings": [text[6:8]], "tokenizer": tokenizer}
    wanted = [model.generate(**request) for request in requests]
    assert wanted[5].shape[1] < LENGTHS[5] + 20
    attach(model, "never", capture, slots=SLOTS)
    assert agree(all_at_once(model, requests), wanted)


def test_those_that_sample_alike_share_a_step_and_others_do_not(capture):
    model = build()
    attach(model, "never", capture, slots=SLOTS)
    sampled = {"do_sample": True, "top_k": 0, "temperature": 0.8}
    answers = all_at_once(model, requests_of([9, 12, 15], **sampled))
    assert [answer.shape[1] for answer in answers] == [9 + 20, 12 + 29, 15 + 38]
    keys = {key for session in model.generate.loop.batches for key in session.steps}
    assert "logits" not in keys
    all_at_once(model, requests_of([9], **sampled) + requests_of([12]))
    assert "logits" in {key for session in model.generate.loop.batches for key in session.steps}


def test_streamers_get_their_own(capture):
    model = build()
    requests = requests_of(LENGTHS)
    wanted = [Puts() for _ in requests]
    for request, streamer in zip(requests, wanted, strict=True):
        model.generate(**request, streamer=streamer)
    attach(model, "never", capture, slots=SLOTS)
    got = [Puts() for _ in requests]
    all_at_once(model, [request | {"streamer": streamer} for request, streamer in zip(requests, got, strict=True)])
    assert [(each.puts, each.ended) for each in got] == [(each.puts, each.ended) for each in wanted]


@pytest.mark.parametrize("when", [0, 1, 5])
def test_who_leaves_takes_nobody_along(when, capture):
    """At its prompt, its first token, and amid others."""
    model = build()
    requests = requests_of(LENGTHS[:5])
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=SLOTS)
    requests[2] |= {"streamer": Puts(stop_at=when)}
    answers = all_at_once(model, requests)
    assert isinstance(answers.pop(2), KeyboardInterrupt)
    del wanted[2]
    assert agree(answers, wanted)


def test_what_the_loop_does_not_do_waits_for_its_turn(capture):
    """Beams, several sequences, a padded prompt, between requests that are batched."""
    model = build()
    requests = requests_of(LENGTHS[:5])
    requests[1] |= {"num_beams": 2}
    requests[2] |= {"input_ids": prompt(3, 6)}
    requests[3] |= {name: tensor[:1] for name, tensor in padded([5, 20]).items()}
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=SLOTS)
    assert agree(all_at_once(model, requests), wanted)


def test_where_there_is_no_memory_for_a_batch_one_follows_the_other(monkeypatch, capture):
    model = build()
    requests = requests_of(LENGTHS)
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=SLOTS)

    def refuse(self, joining) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Batch, "_lay", refuse)
    assert agree(all_at_once(model, requests), wanted)


def test_idle_batches_give_their_memory_to_the_one_at_work(monkeypatch, capture):
    model = build()
    requests = requests_of(LENGTHS)
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=SLOTS)
    all_at_once(model, requests[:2])
    lay, refused = Batch._lay, []

    def refuse_once(self, joining) -> None:
        if not refused:
            refused.append(sizes_of(model))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        lay(self, joining)

    monkeypatch.setattr(Batch, "_lay", refuse_once)
    assert agree(all_at_once(model, requests), wanted)
    assert refused == [{2}]


def test_an_error_in_laying_rows_is_told_to_all(monkeypatch):
    model = build()
    attach(model, "never", None, slots=SLOTS)

    def fail(self, joining) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Batch, "_lay", fail)
    assert "broken" in {str(answer) for answer in all_at_once(model, requests_of(LENGTHS))}
    monkeypatch.undo()
    assert isinstance(all_at_once(model, requests_of(LENGTHS[:2]))[0], torch.Tensor)


def test_a_request_that_nobody_waits_for_ends(capture):
    """Its thread was interrupted."""
    model = build()
    attach(model, "never", capture, slots=SLOTS)
    worker, steps = model.generate.worker, []
    model.register_forward_pre_hook(lambda *call: steps.append(1))
    wait = worker._wait_for

    def interrupted(job) -> None:
        job.left.set()
        return wait(job)

    worker._wait_for = interrupted
    with pytest.raises(InterruptedError):
        model.generate(**requests_of([9])[0])
    del worker._wait_for
    assert len(steps) <= 1


def test_no_graph_of_gradients_is_made(capture):
    """Of several sequences, too, which the worker answers alone."""
    model = build()
    attach(model, "never", capture, slots=SLOTS)
    all_at_once(model, [{"input_ids": prompt(3, 6), **GREEDY}, *requests_of(LENGTHS[:3])])
    running = model.generate.loop
    sessions = [*running.sessions, *running.batches]
    assert len(sessions) > 2
    assert not any(layer.keys.requires_grad for session in sessions for layer in session.inputs.cache.layers)


def test_where_there_is_memory_for_two_the_third_waits(monkeypatch, capture):
    model = build()
    requests = requests_of(LENGTHS)
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=SLOTS)
    lay, sizes = Batch._lay, set()

    def refuse_more(self, joining) -> None:
        if len(self.rows) + len(joining) > 2:
            raise torch.OutOfMemoryError
        lay(self, joining)
        sizes.add(self.session.batch)

    monkeypatch.setattr(Batch, "_lay", refuse_more)
    assert agree(all_at_once(model, requests), wanted)
    assert sizes == {2}


def test_an_error_of_the_model_is_told_to_all_and_the_next_are_served(capture):
    model = build()
    requests = requests_of(LENGTHS[:3])
    wanted = [model.generate(**request) for request in requests]
    attach(model, "never", capture, slots=SLOTS)
    calls = []

    def fail(module, given) -> None:
        calls.append(given)
        if len(calls) == 6:
            raise RuntimeError("broken")

    hook = model.register_forward_pre_hook(fail)
    answers = all_at_once(model, requests)
    if capture is None:
        assert [str(answer) for answer in answers] == ["broken"] * 3
    hook.remove()
    assert agree(all_at_once(model, requests), wanted)


def test_a_request_out_of_a_request_does_not_wait_for_itself():
    model = build()
    wanted = model.generate(prompt(1, 5), **GREEDY)
    inner = []

    def nested(ids, scores):
        if not inner:
            inner.append(model.generate(prompt(1, 5), **GREEDY))
        return scores

    attach(model, "never", None, slots=SLOTS)
    model.generate(prompt(1, 9), logits_processor=[nested], **GREEDY)
    assert torch.equal(inner[0], wanted)


def test_a_later_turn_finds_what_was_read_before():
    """After a batch, too: the prompt's session still holds what it held."""
    model = build()
    attach(model, "never", None, slots=SLOTS)
    model.generate(prompt(1, 20), **GREEDY)
    (session,) = model.generate.loop.sessions
    assert len(session.held) > 20


def test_the_model_goes_with_its_last_user():
    model = build()
    attach(model, "never", None, slots=SLOTS)
    all_at_once(model, requests_of(LENGTHS[:3]))
    model.generate.worker.alone(lambda has_left: gc.collect())  # after the batch, which ends behind its answers
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
