"""Coded caches in transformers: `generate` of every kind, and what is refused."""

import copy

import pytest
import torch
from coded_models import coded, llama, logits_step_by_step, small, tokens
from transformers import AutoConfig

import qpalette
from qpalette.core.errors import InputError, SpecError, UnsupportedError
from qpalette.evaluate.cache import evaluate_cache
from qpalette.kvcache import parse_cache
from qpalette.nn.coded_cache import check_cacheable
from qpalette.runtime import select

pytestmark = pytest.mark.usefixtures("one_thread")
FINE = "white:nuq-8,sinks=2"  # near enough for the same tokens where they are far apart


@pytest.fixture(scope="module")
def model():
    return llama()


def test_generate_takes_it(model):
    ids = tokens(2, 7)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    found = model.generate(ids, past_key_values=coded(model, FINE), **options)
    # Tokens may part where two are near; the first logits come from the exact prompt, the next from codes.
    torch.testing.assert_close(found.logits[0], plain.logits[0], rtol=1e-4, atol=1e-4)
    assert (found.logits[1] - plain.logits[1]).abs().max() > 1e-4
    assert (found.logits[1] - plain.logits[1]).norm() < 0.1 * plain.logits[1].norm()


def test_the_public_call(model, tmp_path):
    cache = qpalette.cache(model, "white:vq-3", 40)
    assert model.generate(tokens(1, 5), past_key_values=cache, max_new_tokens=4, do_sample=False).shape == (1, 9)
    assert float(cache.bits) == 3 + 8 / 16
    with pytest.raises(SpecError):
        qpalette.cache(model, "vq-33", 40)
    with pytest.raises(InputError, match="say which cache"):
        qpalette.cache(model)


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:nuq-3,sinks=3,window=5", "white:vq4-2,sinks=0"])
def test_one_call_or_many_give_the_same(model, spec):
    """However a prompt is cut, each token reads the same codes; with a window, no more exact tokens than alone."""
    ids = tokens(2, 30)
    whole = coded(model, spec, own_exact=False)
    with torch.no_grad():
        at_once = model(ids, past_key_values=whole).logits
    alone = logits_step_by_step(model, ids, coded(model, spec, own_exact=False))
    if whole.feed is None:
        torch.testing.assert_close(at_once, alone, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(at_once[:, -1], alone[:, -1], rtol=0.5, atol=2.0)
        assert whole.feed == 2


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:vq-2,sinks=2,window=5"])
def test_padding_on_the_left_changes_nothing(model, spec):
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :4], mask[1, :1] = 0, 0
    cache = coded(model, spec, padding=mask)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=cache)
    for row, pads in enumerate((4, 1, 0)):
        alone = ids[row : row + 1, pads:]
        own = model.generate(alone, max_new_tokens=10, do_sample=False, past_key_values=coded(model, spec))
        assert found[row, pads:].tolist() == own[0].tolist()


def test_padding_on_the_right_changes_nothing(model):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    spec = "white:vq-2,sinks=2"
    with torch.no_grad():
        both = model(ids, attention_mask=mask, past_key_values=coded(model, spec)).logits
        alone = model(ids[:1, :9], past_key_values=coded(model, spec)).logits
    torch.testing.assert_close(both[:1, :9], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:vq-2,sinks=1,window=4"])
def test_beams_are_reordered(model, spec):
    """Each beam's score is what its tokens have when they go through a cache alone."""
    ids = tokens(2, 6)
    options = {"num_beams": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    cache = coded(model, spec)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=8, length_penalty=0.0, **options)
    for row in range(2):
        cache = coded(model, spec)
        with torch.no_grad():
            first = model(ids[row : row + 1], past_key_values=cache).logits[:, -1:]
            later = logits_step_by_step(model, found.sequences[row : row + 1, 6:-1], cache)
        scores = torch.cat([first, later], 1)[0].log_softmax(-1)
        own = scores.gather(-1, found.sequences[row, 6:, None]).sum()
        assert float(found.sequences_scores[row]) == pytest.approx(float(own), rel=1e-3)


@pytest.mark.parametrize("spec", ["white:vq-2,sinks=2", "white:vq-2,sinks=2,window=6"])
def test_cropped_it_goes_on_as_if_the_rest_had_never_come(model, spec):
    ids, cache, other = tokens(2, 40), coded(model, spec), coded(model, spec)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-15)
        assert int(cache.get_seq_length()) == 25
        model(ids[:, :25], past_key_values=other)
        if parse_cache(spec).exact.window:
            other.crop(0)
            for layer in other.layers:  # what leaves a window is coded, and does not come back by a cut
                for stream in layer.streams:
                    stream.ring_tokens[stream.ring_tokens < 34] = -1
        more = tokens(2, 3, seed=5)
        a, b = (logits_step_by_step(model, more, one) for one in (cache, other))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    with torch.no_grad():
        again = model(ids, past_key_values=cache).logits
        fresh = model(ids, past_key_values=coded(model, spec)).logits
    assert torch.equal(again, fresh)


def test_a_prompt_longer_than_the_cache_is_refused(model):
    cache = coded(model, FINE, length=8)
    with pytest.raises(InputError, match="room for 8 tokens, not for 9"):
        model(tokens(1, 9), past_key_values=cache)
    model(tokens(1, 8), past_key_values=cache)
    with pytest.raises(InputError, match="room for 8 tokens, not for 9"):
        model(tokens(1, 1), past_key_values=cache)
    with pytest.raises(InputError, match="mask of 2 sequences, and gets 3"):
        model(tokens(3, 2), past_key_values=coded(model, FINE, padding=torch.ones(2, 2)))


def test_a_type_without_kernels_runs_by_the_definition(model):
    ids, cache, spec = tokens(1, 20), coded(model, FINE), "white:nuq-8,sinks=2"
    exact = copy.deepcopy(model).double()
    found = logits_step_by_step(model, ids, cache)
    wide = coded(exact, spec, length=20)
    torch.testing.assert_close(found, logits_step_by_step(exact, ids, wide).float(), rtol=1e-2, atol=1e-2)
    assert wide.layers[0].key_stream.sinks.dtype == torch.float64
    with pytest.raises(InputError, match="room for 20 tokens, not for 21"):
        logits_step_by_step(exact, ids[:, :1], wide)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_a_first_prompt_is_not_decoded(kind, monkeypatch):
    """It attends to itself as it came; what follows, and a prompt whose mask is for the whole cache, reads codes."""
    options = {} if kind == "llama" else {"sliding_window": 8}
    options |= {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "gpt_oss" else {}
    model, seen = small(kind, **options), []
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :5] = 0
    kernels = type(select("cache", "nuq-2", model.device))
    read = kernels.stream.read
    monkeypatch.setattr(kernels.stream, "read", lambda self, *given: (seen.append(self), read(self, *given))[1])
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            cache = coded(model, "white:nuq-2", padding=given.get("attention_mask"))
            found = model(ids, past_key_values=cache, **given).logits
            wanted = model(ids, **given).logits
            torch.testing.assert_close(found[:, 5:], wanted[:, 5:], rtol=1e-4, atol=1e-4)
        assert not seen
        model(ids[:, :3], past_key_values=cache)
        assert len(seen) == 4
        cache.reset()
        seen.clear()
        model(ids, past_key_values=cache)
        assert not seen
        model(ids, past_key_values=coded(model, "white:nuq-2", own_exact=False))
        assert len(seen) == 4


def test_a_prompt_with_a_mask_of_its_own_is_read_by_it(model):
    ids, cache = tokens(1, 9), coded(model, FINE, length=12)
    mask = torch.ones(9, 12, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        found = model(ids, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": 8}),
        (
            "gemma2",
            {"sliding_window": 8, "attn_implementation": "eager"},
        ),  # soft caps, and windows in every other layer
        ("gpt_oss", {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),  # learned sinks
        ("qwen2", {}),
        ("phi3", {"pad_token_id": 0}),
    ],
)
def test_windows_soft_caps_and_learned_sinks_are_the_models_own(kind, options):
    model = small(kind, **options)
    window = tokens(1, 40)[0]
    assert evaluate_cache(model, None, "white:nuq-8,sinks=0", [window]).kl < 1e-4
    assert evaluate_cache(model, None, "white:nuq-2,sinks=0", [window]).kl > 0


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (AutoConfig.for_model("deepseek_v3"), "latent attention"),
        (AutoConfig.for_model("mamba2"), "Linear"),
        (AutoConfig.for_model("t5"), "encoder"),
    ],
)
def test_what_cannot_be_coded_is_refused_by_name(config, name):
    with pytest.raises(UnsupportedError, match=name):
        check_cacheable(config)
