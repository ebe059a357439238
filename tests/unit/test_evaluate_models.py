"""Perplexity, KL and agreement against direct computations on tiny random models."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qpalette.core.errors import CheckpointError, InputError
from qpalette.evaluate import bits_per_weight, evaluate, evaluate_models, metrics, token_windows
from qpalette.evaluate.loading import is_artifact, load_model

VOCABULARY = 128


def tiny_llama(seed: int, vocabulary: int = VOCABULARY, context: int = 2048) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<s>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>")


def noisy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    return model


def random_windows(count: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, VOCABULARY, (count, length), generator=generator))


@pytest.fixture
def text(tmp_path):
    generator = torch.Generator().manual_seed(2)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{i}" for i in torch.randint(1, VOCABULARY, (150,), generator=generator).tolist()))
    return file


def test_a_model_agrees_with_itself():
    model, windows = tiny_llama(0), random_windows(3, 40)
    result = evaluate_models(model, model, windows)
    assert (result.kl, result.kl_stderr, result.top1) == (0.0, 0.0, 1.0)
    assert result.perplexity == result.reference_perplexity
    assert (result.windows, result.tokens) == (3, 3 * 39)


def test_figures_equal_a_direct_computation(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 16)  # several chunks, the last one shorter
    model, reference, windows = tiny_llama(0), noisy(tiny_llama(0)), random_windows(2, 40)
    result = evaluate_models(model, reference, windows)
    with torch.no_grad():
        mine, true = ([m(w[None]).logits[0, :-1].double() for w in windows] for m in (model, reference))
    targets = torch.cat([window[1:] for window in windows])
    mine_all, true_all = torch.cat(mine), torch.cat(true)
    assert math.log(result.perplexity) == pytest.approx(float(F.cross_entropy(mine_all, targets)), rel=1e-5)
    assert math.log(result.reference_perplexity) == pytest.approx(float(F.cross_entropy(true_all, targets)), rel=1e-5)
    divergences = [
        float(F.kl_div(m.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean"))
        for m, t in zip(mine, true, strict=True)
    ]
    assert result.kl == pytest.approx(sum(divergences) / 2, rel=1e-5)
    assert result.kl_stderr == pytest.approx(abs(divergences[0] - divergences[1]) / 2, rel=1e-4)
    assert result.top1 == pytest.approx(float((mine_all.argmax(-1) == true_all.argmax(-1)).double().mean()))
    assert 0 < result.top1 < 1


def test_without_reference_only_the_perplexity():
    seen = []
    model, windows = tiny_llama(0), random_windows(2, 10)
    result = evaluate_models(model, None, windows, progress=lambda done, total: seen.append((done, total)))
    assert result.perplexity > 1
    assert (result.reference_perplexity, result.kl, result.kl_stderr, result.top1) == (None,) * 4
    assert seen == [(1, 2), (2, 2)]


class CoarseCache(DynamicCache):
    """Keeps keys and values as multiples of 1/8."""

    def update(self, key_states, value_states, *arguments, **options):
        return super().update((8 * key_states).round() / 8, (8 * value_states).round() / 8, *arguments, **options)


def coarse(model: LlamaForCausalLM) -> CoarseCache:
    return CoarseCache(config=model.config)


def one_by_one(model: LlamaForCausalLM, window: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """The logits of a window whose tokens come one after the other, as in generation."""
    with torch.no_grad():
        steps = [model(token[None, None], past_key_values=cache, use_cache=True).logits[0, 0] for token in window]
    return torch.stack(steps)


def test_what_a_cache_loses_is_measured():
    """Against decoding token by token. The models compute in float64, so that no key falls to another side of a step;
    logits are compared in float32: each log-probability is off by a few roundings of the largest logit, and so is the
    mean of their differences."""
    model, windows = tiny_llama(0).double(), random_windows(2, 40)
    result = evaluate_models(model, model, windows, cache=coarse)
    mine = torch.cat([one_by_one(model, window, coarse(model))[:-1] for window in windows])
    true = torch.cat([one_by_one(model, window, DynamicCache(config=model.config))[:-1] for window in windows])
    wanted = F.kl_div(mine.log_softmax(-1), true.log_softmax(-1), log_target=True, reduction="batchmean")
    tolerance = 8 * torch.finfo(torch.float32).eps * float(true.abs().max())
    assert result.kl == pytest.approx(float(wanted), abs=tolerance)
    assert result.kl > 100 * tolerance
    assert evaluate_models(model, model, windows).kl == 0


def test_a_model_that_brings_its_own_cache_is_measured_with_it(monkeypatch):
    model, windows = tiny_llama(0), random_windows(1, 40)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.DynamicCache", CoarseCache)
    lossy = evaluate_models(model, None, windows).perplexity
    monkeypatch.undo()
    assert lossy == evaluate_models(model, None, windows, cache=coarse).perplexity
    assert lossy != evaluate_models(model, None, windows).perplexity


def test_every_window_has_a_cache_of_its_own():
    made = []

    def make(model: LlamaForCausalLM) -> DynamicCache:
        made.append(DynamicCache(config=model.config))
        return made[-1]

    model, windows = tiny_llama(0), random_windows(3, 10)
    assert evaluate_models(model, model, windows, cache=make).kl == 0
    assert [cache.get_seq_length() for cache in made] == [10, 10, 10]


def test_one_window_has_no_standard_error():
    assert evaluate_models(tiny_llama(0), tiny_llama(1), random_windows(1, 10)).kl_stderr is None


def test_models_that_do_not_compare_are_refused():
    with pytest.raises(InputError, match="vocabularies of 128 and 96"):
        evaluate_models(tiny_llama(0), tiny_llama(0, vocabulary=96), [torch.arange(10)])
    with pytest.raises(InputError, match="token 127"):
        evaluate_models(tiny_llama(0, vocabulary=96), None, [torch.tensor([1, 127])])
    with pytest.raises(InputError, match="no windows"):
        evaluate_models(tiny_llama(0), None, [])


def test_windows_do_not_overlap_and_drop_the_tail(text):
    tokenizer = tiny_tokenizer()
    every = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    windows = token_windows(text, tokenizer, length=64)
    assert torch.cat(windows).tolist() == every[:128]
    assert [len(window) for window in windows] == [64, 64]
    assert len(token_windows(text, tokenizer, length=64, limit=1)) == 1
    assert [len(window) for window in token_windows(text, tokenizer)] == [150], "the tail is all there is"


CORPUS = "".join(
    f"a{'b' * (i % 7)} word{i % 13}, {i * 7919 % 1000} \u00e9\u4e16\u754c{'x' * (i % 40)}\n" for i in range(3000)
)


def trained(
    model: models.Model, trainer: object, splits: pre_tokenizers.PreTokenizer | None
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if splits is not None:
        tokenizer.pre_tokenizer = splits
    tokenizer.train_from_iterator([CORPUS[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {
    "byte-level": lambda: trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "not split at all": lambda: trained(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False),
        None,
    ),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
        pre_tokenizers.Metaspace(),
    ),
    "words": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
    ),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@pytest.mark.parametrize(("length", "count"), [(16, 1), (64, 3), (100, 40)])
def test_of_a_long_text_no_more_is_read_than_asked_for(tmp_path, monkeypatch, tokenizer, length, count):
    """And what is read gives the tokens that all of it would."""
    text, found = tmp_path / "text.txt", tokenizer()
    text.write_text(CORPUS)
    whole = token_windows(text, found, length)
    read = 0

    def counted(text: str, **options):
        nonlocal read
        read += len(text)
        return found(text, **options)

    windows = token_windows(text, counted, length, count)
    assert len(windows) == count
    assert all(map(torch.equal, windows, whole))
    assert read < min(len(CORPUS), 64 * (length * count + 64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"w1", "1 token"),
        (b"\xff\xfe\x00w", "not text"),
        (b"w1 \0 w2", "not text"),
    ],
)
def test_unusable_texts_are_named(tmp_path, content, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        token_windows(file, tiny_tokenizer())
    assert str(file) in str(caught.value)


def test_missing_files_and_limits_are_named(tmp_path, text):
    with pytest.raises(InputError, match="does not exist"):
        token_windows(tmp_path / "none.txt", tiny_tokenizer())
    with pytest.raises(InputError, match="is a directory"):
        token_windows(tmp_path, tiny_tokenizer())
    for limit in (0, -1):
        with pytest.raises(InputError, match=f"at least 1, got {limit}"):
            token_windows(text, tiny_tokenizer(), limit=limit)


@pytest.fixture
def saved(tmp_path):
    """Two directories with the same tokenizer, a context of 32 and different weights."""
    directories = []
    for seed in (0, 1):
        directories.append(tmp_path / f"model{seed}")
        tiny_llama(seed, context=32).half().save_pretrained(directories[-1])
        tiny_tokenizer().save_pretrained(directories[-1])
    return directories


def test_evaluate_reads_directories_and_respects_the_context(saved, text):
    result = evaluate(saved[0], saved[1], text, windows=3)
    assert (result.windows, result.tokens) == (3, 3 * 31)
    assert result.kl > 0
    assert result.bits_per_weight == 16.0 == bits_per_weight(saved[0])
    model, tokenizer = load_model(saved[0])
    assert model.dtype == torch.float32
    direct = evaluate_models(model, None, token_windows(text, tokenizer, 32, 3))
    assert result.perplexity == direct.perplexity


def test_without_text_the_reference_writes_it(saved):
    result = evaluate(saved[0], saved[1], windows=2)
    assert (result.windows, result.tokens) == (2, 2 * 31)
    assert result.reference_perplexity < result.perplexity
    with pytest.raises(InputError, match="a text, or a reference"):
        evaluate(saved[0])


def test_models_that_cannot_be_loaded_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "none")
    config = json.loads((saved[0] / "config.json").read_text())
    (saved[0] / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model", "architectures": []}))
    with pytest.raises(CheckpointError, match="cannot load"):
        load_model(saved[0])
    assert not is_artifact(saved[0])
    assert not is_artifact(tmp_path / "none")


def test_median_and_tail_are_those_of_single_predictions():
    model, reference, windows = tiny_llama(0), noisy(tiny_llama(0)), random_windows(3, 1200)
    result = evaluate_models(model, reference, windows)
    with torch.no_grad():
        mine, true = (
            torch.cat([m(w[None]).logits[0, :-1] for w in windows]).log_softmax(-1) for m in (model, reference)
        )
    each = sorted((true.exp() * (true - mine)).sum(-1).tolist())
    below = [sum(value <= bound for value in each) / len(each) for bound in (result.kl_median, result.kl_999)]
    # The least value with so large a share: one prediction of 3597 more, and rounding may swap two neighbours.
    assert below == pytest.approx([0.5, 0.999], abs=3 / len(each))
    assert each[0] < result.kl_median < result.kl_999 < each[-1]
