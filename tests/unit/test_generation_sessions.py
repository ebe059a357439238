"""What stays from one request to the next: caches, the tokens in them, captured steps; and a model that changes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from generation_cases import GREEDY, Puts, build, capture, prompt, sessions_of, short_caches, whole

from qpalette.generation import attach
from qpalette.generation.session import CHOICES, SESSIONS, Session
from qpalette.kvcache import bucket, lengths

__all__ = ["capture", "short_caches"]

pytestmark = pytest.mark.usefixtures("one_thread", "short_caches")


def test_lengths_of_caches(monkeypatch):
    monkeypatch.setattr(lengths, "STEP", 1024)
    assert [bucket(tokens, None) for tokens in (1, 1024, 1025, 8192, 8193, 10241, 16384, 16385)] == [
        1024,
        1024,
        2048,
        8192,
        10240,
        12288,
        16384,
        20480,
    ]
    assert [bucket(tokens, 1500) for tokens in (7, 1400, 1600)] == [1024, 1500, 1600]
    every = {bucket(tokens, None) for tokens in range(1, 131073, 17)}
    assert len(every) == 8 + 4 * 4
    assert all(bucket(tokens, None) <= max(tokens + 1023, 1.25 * tokens) for tokens in range(1, 131073, 17))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_conversation_reads_only_what_is_new(kind, capture):
    """Over buckets, and with the tokens of a model that reads everything at every turn."""
    fresh, model = build(kind), build(kind)
    attach(model, "never", capture)
    read = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, _: read.append(given[0].shape[1]))
    history = prompt(1, 18)
    for turn in range(8):
        before = history
        wanted = fresh.generate(**whole(history), **GREEDY)
        read.clear()
        history = model.generate(**whole(history), **GREEDY)
        assert torch.equal(history, wanted)
        if turn:
            assert read[0] <= 10, "the last token of an answer and the question"
        history = torch.cat([history, prompt(1, 9, seed=turn)], 1)
    assert before.shape[1] > 200
    assert len({session.length for session in sessions_of(model)}) == SESSIONS


def test_what_differs_is_read_anew(capture):
    fresh, model = build(), build()
    attach(model, "never", capture)
    first = model.generate(**whole(prompt(1, 40)), **GREEDY)
    for kept in (0, 10, 19, 21, 35, 40, 55, 64):
        changed = first.clone()
        changed[:, kept:] = prompt(1, 64, seed=9)[:, kept:]
        assert torch.equal(model.generate(**whole(changed), **GREEDY), fresh.generate(**whole(changed), **GREEDY))
        assert torch.equal(model.generate(**whole(prompt(1, 40)), **GREEDY), first)


def test_positions_of_the_user_are_not_those_of_a_session(capture):
    fresh, model = build(), build()
    attach(model, "never", capture)
    shifted = {"input_ids": prompt(1, 30), "position_ids": torch.arange(30)[None] * 2}
    plain = model.generate(prompt(1, 30), **GREEDY)
    assert torch.equal(model.generate(**shifted, **GREEDY), fresh.generate(**shifted, **GREEDY))
    assert torch.equal(model.generate(prompt(1, 30), **GREEDY), plain)


def test_requests_of_any_length_keep_few_sessions_and_no_cache_of_old_ones(capture):
    """200 of them: caches, steps and captures stay bounded, and what left is gone without the garbage collector."""
    model = build()
    attach(model, "never", capture)
    seen: weakref.WeakSet[object] = weakref.WeakSet()
    random = torch.Generator().manual_seed(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(200):
            tokens, new, batch = (int(torch.randint(1, high, (), generator=random)) for high in (150, 30, 4))
            warmth = 1 + number % 7 / 7
            model.generate(
                prompt(batch, tokens, seed=number),
                max_new_tokens=new,
                do_sample=bool(number % 2),
                temperature=warmth,
                pad_token_id=0,
            )
            seen.update(layer for session in sessions_of(model) for layer in session.inputs.cache.layers)
            assert len(sessions_of(model)) <= SESSIONS
            assert all(len(session.steps) <= CHOICES + 1 for session in sessions_of(model))
            assert len(seen) <= 2 * SESSIONS, "two layers each"
    finally:
        gc.enable()


def test_a_model_that_is_gone_takes_its_caches_along(capture):
    model = build()
    attach(model, "never", capture)
    model.generate(prompt(1, 20), **GREEDY)
    layers = [weakref.ref(layer) for session in sessions_of(model) for layer in session.inputs.cache.layers]
    del model
    gc.collect()
    assert [layer() for layer in layers] == [None, None]


def test_interrupted_it_leaves_nothing_wrong(capture):
    fresh, model = build(), build()
    attach(model, "never", capture)
    wanted = fresh.generate(prompt(1, 20), **GREEDY)
    for stop_at in (0, 1, 2, 9, 17):
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt(1, 20), streamer=Puts(stop_at), **GREEDY)
        assert all(session.held is None for session in sessions_of(model))
        assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)


def test_a_cache_that_went_bad_does_not_spoil_the_next_request(capture):
    """A masked value that is not finite would: zero times it is no number."""
    model = build()
    attach(model, "never", capture)
    wanted = model.generate(prompt(1, 20), **GREEDY)
    for session in sessions_of(model):
        for layer in session.inputs.cache.layers:
            layer.values[:, :, : session.used] = torch.nan
        session.held = None
    assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)


def test_without_memory_the_other_sessions_go_first(monkeypatch, capture):
    fresh, model = build(), build()
    attach(model, "never", capture)
    for batch in (1, 2, 3):
        model.generate(prompt(batch, 20), **GREEDY)
    take, asked = Session.take, []

    def short(session, given, kept):
        asked.append(kept)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("no memory")
        return take(session, given, kept)

    monkeypatch.setattr(Session, "take", short)
    assert torch.equal(model.generate(prompt(1, 25), **GREEDY), fresh.generate(prompt(1, 25), **GREEDY))
    assert (len(asked), len(sessions_of(model))) == (2, 1)


def test_threads_take_turns(capture):
    fresh, model = build(), build()
    attach(model, "never", capture)
    prompts = [prompt(1, 8 + number, seed=number) for number in range(8)]
    wanted = [fresh.generate(ids, **GREEDY).tolist() for ids in prompts]
    got: dict[int, list] = {}

    def work(number: int) -> None:
        for _ in range(3):
            got[number] = model.generate(prompts[number], **GREEDY).tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(8)] == wanted


def test_a_request_within_a_request(capture):
    fresh, model = build(), build()
    attach(model, "never", capture)
    inner = fresh.generate(prompt(1, 9, seed=4), **GREEDY)

    class Nested(Puts):
        def put(self, value) -> None:
            super().put(value)
            assert torch.equal(model.generate(prompt(1, 9, seed=4), **GREEDY), inner)

    wanted = fresh.generate(prompt(1, 20), **GREEDY)
    assert torch.equal(model.generate(prompt(1, 20), streamer=Nested(), **GREEDY), wanted)


def test_inference_mode_leaves_no_trace(capture):
    model = build()
    attach(model, "never", capture)
    with torch.inference_mode():
        wanted = model.generate(prompt(1, 20), **GREEDY)
    assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)


# --- a model that changes ----------------------------------------------------------------------------------------


def test_changed_modules_are_captured_anew(capture):
    model = build()
    attach(model, "never", capture)
    before = model.generate(prompt(1, 20), **GREEDY)
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(32, 32, bias=False)
    fresh = copy.deepcopy(model)
    del fresh.generate
    wanted = fresh.generate(prompt(1, 20), **GREEDY)
    assert not torch.equal(wanted, before)
    assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)


def test_a_copy_has_a_loop_of_its_own(capture):
    model = build()
    attach(model, "never", capture)
    wanted = model.generate(prompt(1, 20), **GREEDY)
    twin = copy.deepcopy(model)
    assert twin.generate.model is twin
    assert torch.equal(twin.generate(prompt(1, 20), **GREEDY), wanted)
    assert len(sessions_of(twin)) == 1
    assert sessions_of(twin) != sessions_of(model)
