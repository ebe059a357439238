"""The decoding loop against transformers' own, in float32 on the CPU, with and without (pretended) captures."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from qpalette.backends.cpu.step import Program
from qpalette.core.errors import InputError
from qpalette.generation import attach, cache, compilation, fast, loop
from qpalette.generation.cache import bucket
from qpalette.generation.choice import most_likely
from qpalette.generation.fast import can_serve
from qpalette.generation.native import ProgramCapture
from qpalette.generation.session import CHOICES, SESSIONS, Session
from qpalette.generation.step import Capture

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # logits far apart, so that greedy tokens mean something
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MAKERS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            initializer_range=0.4,
            eos_token_id=None,
            bos_token_id=0,
        )
    ),
}
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


class Replay:
    """What a CUDA graph is to the loop: something that does the step again."""

    made = 0

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = weakref.WeakMethod(work)  # a graph knows memory, and keeps no step
        Replay.made += 1

    def replay(self) -> None:
        self.work()()


class Programs(ProgramCapture):
    """Steps as programs of compiled kernels; waits for these, so that every test has them."""

    def __call__(self, work: Callable[[], None]) -> Program | None:
        program = super().__call__(work)
        if program is None:
            self.wait()
            program = super().__call__(work)
        Replay.made += 1
        return program


@pytest.fixture(params=[None, Replay, Programs], ids=["eager", "captured", "program"])
def capture(request) -> Capture | None:
    Replay.made = 0
    return Programs() if request.param is Programs else request.param


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny products are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _short_caches(monkeypatch):
    """Buckets of 32 tokens, so that requests of the tests outgrow them."""
    monkeypatch.setattr(cache, "STEP", 32)
    monkeypatch.setattr(loop, "AHEAD", 32)


def build(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    return MAKERS[kind]().eval()


def prompt(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = prompt(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : ids.shape[1] - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def whole(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Without a mask transformers takes a token of the padding's number for padding."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Puts(BaseStreamer):
    def __init__(self, stop_at: int | None = None) -> None:
        self.puts, self.ended, self.stop_at = [], 0, stop_at

    def put(self, value) -> None:
        if len(self.puts) == self.stop_at:
            raise KeyboardInterrupt
        self.puts.append((value.device.type, value.dtype, value.tolist()))

    def end(self) -> None:
        self.ended += 1


def sessions_of(model) -> list[Session]:
    """None of them before the loop has run."""
    running = model.generate.loop
    return [] if running is None else list(running.sessions)


# --- the same tokens as transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("inputs", [{"input_ids": prompt(1, 20)}, {"input_ids": prompt(3, 7)}, padded([5, 20, 11])])
def test_greedy_tokens_are_those_of_transformers(kind, inputs, capture):
    model = build(kind)
    wanted = model.generate(**inputs, **GREEDY | {"max_new_tokens": 60})
    attach(model, "never", capture)
    for _ in range(2):  # the second request finds a session
        assert torch.equal(model.generate(**inputs, **GREEDY | {"max_new_tokens": 60}), wanted)
    assert sessions_of(model), "the loop ran"
    assert bool(Replay.made) == (capture is not None)


OPTIONS = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "no n-gram twice": {"no_repeat_ngram_size": 2},
    "at least so many": {"min_new_tokens": 10, "eos_token_id": list(range(1, 60))},
    "sampled": {"do_sample": True, "top_k": 0},
    "top k and p": {"do_sample": True, "top_k": 9, "top_p": 0.8, "temperature": 1.7},
    "min p": {"do_sample": True, "top_k": 0, "min_p": 0.05, "temperature": 2.0, "renormalize_logits": True},
    "typical": {"do_sample": True, "top_k": 0, "typical_p": 0.6, "epsilon_cutoff": 0.01},
    "sampled with a penalty": {"do_sample": True, "top_k": 0, "repetition_penalty": 1.4},
    "several answers": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "ends in one sequence first": {"eos_token_id": [5, 9, 14, 22, 40, 41, 60]},
    "a few tokens": {"max_new_tokens": 1},
    "by length": {"max_new_tokens": None, "max_length": 26},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("inputs", [{"input_ids": prompt(1, 12)}, padded([5, 14])], ids=["one", "padded"])
def test_options_of_generation_mean_the_same(options, inputs, capture):
    """Sampling too: a draw takes the same noise as torch.multinomial's."""
    model = build()
    given = {**inputs, **GREEDY, **options}
    torch.manual_seed(5)
    wanted = model.generate(**given)
    attach(model, "never", capture)
    for _ in range(2):
        torch.manual_seed(5)
        assert torch.equal(model.generate(**given), wanted)
    assert sessions_of(model), "the loop ran"


def test_a_seed_repeats_and_another_does_not(capture):
    model = build()
    attach(model, "never", capture)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt(1, 5), do_sample=True, top_k=0, max_new_tokens=30, pad_token_id=0).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_streamer_gets_the_same(capture):
    model = build()
    options = GREEDY | {"eos_token_id": [5, 9, 14, 22, 40]}
    wanted = Puts()
    model.generate(prompt(1, 12), streamer=wanted, **options)
    attach(model, "never", capture)
    got = Puts()
    model.generate(prompt(1, 12), streamer=got, **options)
    assert (got.puts, got.ended) == (wanted.puts, wanted.ended)
    assert sessions_of(model), "the loop ran"


def test_arguments_by_place(capture):
    model = build()
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = 9
    wanted = model.generate(prompt(1, 12), config)
    attach(model, "never", capture)
    assert torch.equal(model.generate(prompt(1, 12), config), wanted)
    assert sessions_of(model), "the loop ran"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character."""
    inner = Tokenizer(models.BPE({chr(32 + number): number for number in range(VOCABULARY)}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("where", ["argument", "config"])
def test_stop_strings(tokenizer, where, capture):
    model = build()
    written = model.generate(prompt(1, 12), **GREEDY)[0, 12:].tolist()
    strings = [tokenizer.decode([written[7]])]
    options = {"tokenizer": tokenizer}
    if where == "argument":
        options |= GREEDY | {"stop_strings": strings}
    else:
        options["generation_config"] = copy.deepcopy(model.generation_config)
        options["generation_config"].update(**GREEDY, stop_strings=strings)
    wanted = model.generate(prompt(1, 12), **options)
    assert wanted.shape[1] < 12 + 24
    attach(model, "never", capture)
    assert torch.equal(model.generate(prompt(1, 12), **options), wanted)
    assert sessions_of(model), "the loop ran"
    del options["tokenizer"]
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(prompt(1, 12), **options)


class AtToken(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


class Forbid(LogitsProcessor):
    """Reads the ids: no token twice in a row."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def test_criteria_and_processors_of_the_user(capture):
    model = build()
    written = model.generate(prompt(2, 12), logits_processor=[Forbid()], **GREEDY)
    wanted, mine = AtToken(int(written[0, 20])), AtToken(int(written[0, 20]))
    options = {"logits_processor": [Forbid()], **GREEDY}
    expected = model.generate(prompt(2, 12), stopping_criteria=[wanted], **options)
    attach(model, "never", capture)
    assert torch.equal(model.generate(prompt(2, 12), stopping_criteria=[mine], **options), expected)
    assert mine.lengths == wanted.lengths


def test_each_request_is_chosen_by_its_own_processors(capture):
    """Though they share a step, whose logits they read; and so do more temperatures than steps are captured for."""
    fresh, model = build(), build()
    attach(model, "never", capture)
    sampled = [{"do_sample": True, "top_k": 0, "temperature": 0.5 + number} for number in range(6)]
    for options in [*({"repetition_penalty": 1.1 + number} for number in range(3)), *sampled, *sampled]:
        torch.manual_seed(2)
        wanted = fresh.generate(prompt(1, 12), **GREEDY | options)
        torch.manual_seed(2)
        assert torch.equal(model.generate(prompt(1, 12), **GREEDY | options), wanted)
    (session,) = sessions_of(model)
    assert len(session.steps) == CHOICES


# --- sessions ----------------------------------------------------------------------------------------------------


def test_lengths_of_caches(monkeypatch):
    monkeypatch.setattr(cache, "STEP", 1024)
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


# --- what is not this loop's -------------------------------------------------------------------------------------


def with_embeddings(model) -> dict[str, torch.Tensor]:
    return {"inputs_embeds": model.get_input_embeddings()(prompt(1, 12)).detach()}


OTHERS = {
    "beams": lambda model: {"num_beams": 3},
    "scores": lambda model: {"return_dict_in_generate": True, "output_scores": True},
    "attentions": lambda model: {"return_dict_in_generate": True, "output_hidden_states": True},
    "a cache": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "a static cache": lambda model: {"cache_implementation": "static", "disable_compile": True},
    "no cache": lambda model: {"use_cache": False},
    "an assistant": lambda model: {"assistant_model": build()},
    "a prompt in pieces": lambda model: {"prefill_chunk_size": 4},
    "embeddings": with_embeddings,
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_transformers_does_the_rest(options):
    model = build()
    given = {"input_ids": prompt(1, 12)} | GREEDY
    if options is with_embeddings:
        del given["input_ids"]
    wanted = model.generate(**given, **options(model))
    attach(model, "never", None)
    got = model.generate(**given, **options(model))
    assert not sessions_of(model), "the loop did not run"
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(got, wanted)
    else:
        assert torch.equal(got.sequences, wanted.sequences)
        assert got.keys() == wanted.keys()


def test_errors_are_those_of_transformers():
    model = build()
    attach(model, "never", None)
    with pytest.raises(ValueError, match=r"model_kwargs.*no_such_thing"):
        model.generate(prompt(1, 12), no_such_thing=1)
    with pytest.raises(ValueError, match="streamer"):
        model.generate(prompt(1, 12), streamer=Puts(), num_beams=2)


def test_stop_strings_of_the_model(tokenizer):
    model = build()
    written = model.generate(prompt(1, 12), **GREEDY)[0, 12:].tolist()
    model.generation_config.stop_strings = [tokenizer.decode([written[7]])]
    wanted = model.generate(prompt(1, 12), tokenizer=tokenizer, **GREEDY)
    attach(model, "never", None)
    for options in ({}, {"stop_strings": [tokenizer.decode([written[7]])]}):
        assert torch.equal(model.generate(prompt(1, 12), tokenizer=tokenizer, **options, **GREEDY), wanted)


def phi3(**more) -> torch.nn.Module:
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**{name: SIZES[name] for name in SIZES if name != "head_dim"} | more)).eval()


def test_models_that_the_loop_can_serve():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not can_serve(mamba), "it holds more than keys and values"
    assert all(can_serve(build(kind)) for kind in MAKERS)
    assert can_serve(phi3())


def test_a_text_that_is_read_anew_when_it_grows_long():
    """Phi3's long rope: at 30 tokens the factors change, and keys of the short ones are of no use any more."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 30, **factors}
    model = phi3(rope_parameters=rope, original_max_position_embeddings=30)
    wanted = model.generate(prompt(1, 20), **GREEDY)
    attach(model, "never", None)
    assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)
    assert not can_serve(model)


def test_on_a_cpu_steps_become_programs():
    model = build()
    wanted = model.generate(prompt(1, 20), **GREEDY)
    assert fast(model, "background") is model
    for _ in range(2):
        assert torch.equal(model.generate(prompt(1, 20), **GREEDY), wanted)
        model.generate.wait()
    (step,) = [step for session in sessions_of(model) for step in session.steps.values()]
    assert isinstance(step.graph, Program)
    with pytest.raises(InputError, match="choose never, background, now"):
        fast(model, "perhaps")


def test_a_class_that_cannot_do_with_a_static_cache_keeps_its_own():
    """Bloom's biases are as long as the prompt. The streamer is told once; an error of the request's stays an error."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4)
    model = BloomForCausalLM(config).eval()
    wanted, told = Puts(), Puts()
    options = GREEDY | {"eos_token_id": None}
    options |= {"attention_mask": torch.tensor([[0] * 3 + [1] * 4])}
    tokens = model.generate(prompt(1, 7), streamer=wanted, **options)
    fast(model)
    with pytest.raises(IndexError):
        model.generate(torch.full((1, 7), VOCABULARY), **options)
    for _ in range(2):
        told.puts.clear()
        assert torch.equal(model.generate(prompt(1, 7), streamer=told, **options), tokens)
        assert told.puts == wanted.puts
    assert not [step for session in sessions_of(model) for step in session.steps.values() if step.warm]


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


# --- captures that fail, compilation -----------------------------------------------------------------------------


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


# --- choosing a token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 96, 127, 128])
def test_the_likeliest_token_is_that_of_an_argmax(vocabulary):
    logits = torch.randn(3, vocabulary).round()  # with ties
    assert torch.equal(most_likely(logits), logits.argmax(-1, keepdim=True))
