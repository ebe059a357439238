"""The decoding loop against transformers' own, in float32 on the CPU, with and without (pretended) captures."""

from __future__ import annotations

import copy

import pytest
import torch
from generation_cases import (
    GREEDY,
    MAKERS,
    SIZES,
    VOCABULARY,
    Puts,
    Replay,
    build,
    capture,
    padded,
    prompt,
    sessions_of,
    short_caches,
    tokenizer,
)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StoppingCriteria,
)

from qpalette.backends.cpu.step import Program
from qpalette.core.errors import InputError
from qpalette.generation import attach, fast
from qpalette.generation.choice import most_likely
from qpalette.generation.session import CHOICES
from qpalette.nn.token_cache import can_serve

__all__ = ["capture", "short_caches", "tokenizer"]

pytestmark = pytest.mark.usefixtures("one_thread", "short_caches")


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


# --- choosing a token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 96, 127, 128])
def test_the_likeliest_token_is_that_of_an_argmax(vocabulary):
    logits = torch.randn(3, vocabulary).round()  # with ties
    assert torch.equal(most_likely(logits), logits.argmax(-1, keepdim=True))
