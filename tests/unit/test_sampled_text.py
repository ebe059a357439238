"""Text that a model writes: what it finds likely, in its own chat's words, the same however often it was stopped."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from qpalette.backends.cuda.graphs import CAPTURE_WARMUP
from qpalette.core.errors import InputError, UnsupportedError
from qpalette.evaluate import evaluate_models, model_windows, sample_windows, sampled_text
from qpalette.evaluate.continuation import CapturedContinuation
from qpalette.evaluate.sampled_text import Chat, chat_of, read_token_file
from qpalette.integrations import attention as _grouped  # noqa: F401 - makes READER known to transformers
from qpalette.nn.coded_states import READER

WORDS = ("<s>", "</s>", "system", "user", "assistant", "be", "good")
VOCABULARY = 64
LENGTH = 24
TEMPLATE = (
    "<s> system be good </s> {% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer_of(template: str | None = None) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(WORDS)}
    words |= {f"w{index}": index for index in range(len(WORDS), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="</s>")
    made.chat_template = template
    return made


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_repeats_and_is_what_the_model_finds_likely(model):
    tokenizer = tokenizer_of()
    windows = sample_windows(model, tokenizer, 3, LENGTH, seed=3)
    assert [window.shape for window in windows] == [(LENGTH,)] * 3
    assert equal(windows, sample_windows(model, tokenizer, 3, LENGTH, seed=3))
    assert not torch.equal(windows[0], windows[1])
    assert not torch.equal(windows[0], sample_windows(model, tokenizer, 1, LENGTH, seed=4)[0])
    noise = list(torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1)))
    assert evaluate_models(model, None, windows).perplexity < evaluate_models(model, None, noise).perplexity


def test_first_tokens_have_the_models_probabilities(model, monkeypatch):
    """Of 4000 draws, each token's share within five standard errors, or of a single draw."""
    draws = 4000
    monkeypatch.setattr(sampled_text, "LEAST", draws)
    first = torch.stack(sample_windows(model, tokenizer_of(), draws, 1))[:, 0]
    with torch.no_grad():
        wanted = model(torch.tensor([[0]])).logits[0, -1].double().softmax(-1)
    found = torch.bincount(first, minlength=VOCABULARY) / draws
    error = (wanted * (1 - wanted) / draws).sqrt()
    assert bool(((found - wanted).abs() <= 5 * error + 1 / draws).all())
    assert float(wanted.max()) > 0.05  # far enough from even for the bound to tell


def test_a_chat_is_spelled_by_the_template(model):
    tokenizer = tokenizer_of(TEMPLATE)
    chat = chat_of(tokenizer)
    assert chat == Chat((0, 2, 5, 6, 1, 0, 3), (1, 0, 4), (1, 0, 3), frozenset({1}))
    turns = 0
    for window in sample_windows(model, tokenizer, 12, 80):
        tokens = window.tolist()
        assert tuple(tokens[: len(chat.opening)]) == chat.opening
        place, speaker = len(chat.opening), 0
        while 1 in tokens[place:]:  # what ends a turn is the template's, and the other side's header comes with it
            place = tokens.index(1, place)
            header = (chat.to_assistant, chat.to_user)[speaker]
            assert tuple(tokens[place : place + 3]) == header[: len(tokens) - place]
            place, speaker, turns = place + 3, 1 - speaker, turns + 1
    assert turns >= 4


@pytest.mark.parametrize("template", [None, "nothing of what is said", "{{ raise_exception('no') }}", "{{ broken"])
def test_without_a_usable_template_it_is_running_text(model, template):
    assert chat_of(tokenizer_of(template)) is None
    assert equal(
        sample_windows(model, tokenizer_of(template), 1, LENGTH), sample_windows(model, tokenizer_of(), 1, LENGTH)
    )


TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values of both layers, two heads of eight numbers


@pytest.mark.parametrize(("room", "sides"), [(5, [5, 5, 5, 1]), (1, [2] * 8), (1000, [6, 6, 4])])
def test_a_block_is_what_its_cache_has_room_for(model, monkeypatch, room, sides):
    """No less than LEAST and no more than BLOCK; and those of one block, in which fewer are the first of more."""
    tokenizer, seen = tokenizer_of(TEMPLATE), []
    monkeypatch.setattr(sampled_text, "LEAST", 2)
    monkeypatch.setattr(sampled_text, "BLOCK", 6)
    monkeypatch.setattr(sampled_text, "CACHE_BYTES", room * LENGTH * TOKEN_BYTES)
    watch = model.get_input_embeddings().register_forward_hook(lambda module, given, _: seen.append(given[0].shape))
    try:
        windows = sample_windows(model, tokenizer, 16, LENGTH)
    finally:
        watch.remove()
    opening = len(chat_of(tokenizer).opening)
    assert [rows for rows, tokens in seen if tokens == opening] == [1, *sides]
    assert equal(sample_windows(model, tokenizer, 12, LENGTH)[: sides[0]], windows[: sides[0]])


STATES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
OF_STATES = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**STATES, state_size=4)),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(**STATES, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8)
    ),
}


@pytest.mark.parametrize("make", OF_STATES.values(), ids=OF_STATES)
def test_a_model_of_states_writes_what_it_finds_likely(make):
    """The draws that the whole text's logits want, in a text that was written token by token."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    windows = sample_windows(model, tokenizer_of(), 2, LENGTH)
    for index, window in enumerate(windows):
        given = torch.cat([torch.tensor([0]), window[:-1]])[None]
        draws = torch.rand(LENGTH, generator=torch.Generator().manual_seed(index))
        with torch.inference_mode():
            assert sampled_text._draw(model(given, use_cache=False).logits[0], draws) == window.tolist()
    assert not torch.equal(*windows)


def test_a_model_without_a_cache_is_told():
    """RWKV's state is of one sequence."""
    sizes = {"attention_hidden_size": 32, "intermediate_size": 48, "context_length": 64}
    model = RwkvForCausalLM(RwkvConfig(**STATES, **sizes)).eval()
    with pytest.raises(UnsupportedError, match="--text"):
        sample_windows(model, tokenizer_of(), 1, LENGTH)


class _Killed(Exception):
    pass


def test_killed_it_goes_on_to_the_same_text(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled_text, "LEAST", 2)
    monkeypatch.setattr(sampled_text, "BLOCK", 2)
    tokenizer, keep = tokenizer_of(TEMPLATE), tmp_path / "new" / "text.tokens.json"
    whole = sample_windows(model, tokenizer, 5, LENGTH)
    told: list[tuple[int, int]] = []

    def kill(done: int, total: int) -> None:
        told.append((done, total))
        if done > 3 * LENGTH:
            raise _Killed

    with pytest.raises(_Killed):
        sample_windows(model, tokenizer, 5, LENGTH, keep=keep, progress=kill)
    assert told == sorted(told)
    assert {total for _, total in told} == {5 * LENGTH}
    assert equal(read_token_file(keep), whole[:2])
    told.clear()
    assert equal(sample_windows(model, tokenizer, 5, LENGTH, keep=keep, progress=lambda *a: told.append(a)), whole)
    assert told[0][0] > 2 * LENGTH
    assert told[-1] == (5 * LENGTH, 5 * LENGTH)
    told.clear()
    assert equal(sample_windows(model, tokenizer, 4, LENGTH, keep=keep, progress=lambda *a: told.append(a)), whole[:4])
    assert not told
    assert not equal(sample_windows(model, tokenizer, 4, LENGTH, seed=1, keep=keep), whole[:4])


def test_a_token_file_is_a_text(model, tmp_path):
    keep = tmp_path / "text.tokens.json"
    tokenizer = tokenizer_of()
    written = model_windows(None, model, tokenizer, LENGTH, 3, keep=keep)
    assert equal(model_windows(keep, model, tokenizer, LENGTH, 2), written[:2])
    pieces = [piece for window in written for piece in window.split(8) if len(piece) > 1]
    assert equal(model_windows(keep, model, tokenizer, 8, None), pieces)
    assert equal(model_windows(keep, model, tokenizer, 8, 2), pieces[:2])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"identity": {"kind": "other"}, "figures": {"windows": [[1, 2]]}}),
        json.dumps({"identity": {"kind": "sampled text"}, "figures": {"windows": []}}),
        json.dumps({"identity": {"kind": "sampled text"}, "figures": {"windows": [[1], "a"]}}),
        json.dumps({"identity": {"kind": "sampled text"}, "figures": {"windows": [[1.5, 2]]}}),
        json.dumps({"identity": {"kind": "sampled text"}, "figures": {"windows": [[-1, 2]]}}),
    ],
)
def test_a_wrong_token_file_is_refused(model, tmp_path, content):
    file = Path(tmp_path / "text.tokens.json")
    file.write_text(content)
    with pytest.raises(InputError, match="no file of sampled tokens"):
        model_windows(file, model, tokenizer_of(), LENGTH, None)
    with pytest.raises(InputError, match="no file of sampled tokens"):
        model_windows(tmp_path / "none.tokens.json", model, tokenizer_of(), LENGTH, None)


@pytest.mark.parametrize(("captures", "attention"), [(True, "sdpa"), (True, READER), (False, "sdpa")])
def test_a_captured_step_writes_what_a_growing_cache_does(model, monkeypatch, captures, attention):
    """A graph is played here by running its work again."""
    runs = []

    class Graph:
        def __init__(self, work):
            if not captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.work = work

        def replay(self):
            runs.append(1)
            self.work()

    tokenizer = tokenizer_of(TEMPLATE)
    wanted = sample_windows(model, tokenizer, 3, LENGTH, seed=5)
    monkeypatch.setattr(
        sampled_text, "continuing", lambda model, length: nullcontext(CapturedContinuation(model, length, Graph))
    )
    monkeypatch.setattr(model.config, "_attn_implementation", attention)
    assert equal(wanted, sample_windows(model, tokenizer, 3, LENGTH, seed=5))
    opening = len(chat_of(tokenizer).opening)
    assert len(runs) == captures * (LENGTH - opening - 1 - CAPTURE_WARMUP)
