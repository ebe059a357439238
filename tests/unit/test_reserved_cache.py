"""Memory for the tokens to come makes no difference to a model: not to its logits, whatever layers its cache has."""

from __future__ import annotations

from collections.abc import Callable

import generation_cases
import pytest
import torch
from transformers import (
    Cache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutput

from qpalette.core.errors import UnsupportedError
from qpalette.evaluate.reserved_cache import ReservedLayer, cache_of, reserve

SIZES = generation_cases.SIZES | {"vocab_size": 64}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAKERS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {  # and how many of the two layers keep all tokens
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), 2),
    "sliding window": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **WINDOW)), 1),
    "linear attention": (lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **LINEAR)), 1),
    "state alone": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)),
        0,
    ),
}
OPENING, LENGTH = 3, 20  # more tokens than the window has

pytestmark = pytest.mark.usefixtures("one_thread")


def run(model: torch.nn.Module, room: int | None) -> tuple[torch.Tensor, Cache]:
    """Logits of every step, and the cache; `room` None: transformers' own."""
    ids = torch.randint(0, 64, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    known, logits = {}, []
    with torch.inference_mode():
        for step in (ids[:, :OPENING], *ids[:, OPENING:].split(1, -1)):
            output = model(step, use_cache=True, **known)
            name, cache = cache_of(output)
            if not known and room is not None:
                reserve(cache, room)
            known = {name: cache}
            logits.append(output.logits)
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-4)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("room", [LENGTH, LENGTH // 2], ids=["all fit", "more than was thought"])
def test_logits_are_those_of_transformers_own_cache(kind, room):
    make, full = MAKERS[kind]
    torch.manual_seed(0)
    model = make().eval()
    wanted, plain = run(model, None)
    found, cache = run(model, room)
    assert torch.equal(found, wanted)
    assert sum(type(layer) is ReservedLayer for layer in cache.layers) == full
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        assert type(mine) is (ReservedLayer if type(theirs) is DynamicLayer else type(theirs))
        if type(mine) is ReservedLayer:
            assert mine.get_seq_length() == theirs.get_seq_length()
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)


def test_memory_is_taken_once():
    torch.manual_seed(0)
    cache = run(MAKERS["llama"][0]().eval(), None)[1]
    reserve(cache, LENGTH + 5)
    token = torch.zeros(3, 2, 1, 8)
    places = {cache.layers[0].update(token, token)[0].data_ptr() for _ in range(5)}
    assert len(places) == 1
    cache.layers[0].update(token, token)
    assert cache.get_seq_length() == LENGTH + 6


CHANGES: dict[str, Callable[[Cache], None]] = {
    "cut": lambda cache: cache.crop(-2),
    "rows in another order": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "rows of it": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "rows twice": lambda cache: cache.batch_repeat_interleave(2),
    "emptied": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.inference_mode()
def test_what_transformers_does_with_a_cache_works(change):
    torch.manual_seed(0)
    model = MAKERS["llama"][0]().eval()
    found, wanted = run(model, LENGTH + 5)[1], run(model, None)[1]
    for cache in (found, wanted):
        change(cache)
    rows = 3 if wanted.get_seq_length() == 0 else wanted.layers[0].keys.shape[0]
    for _ in range(3):
        token = torch.randn(2, rows, 2, 1, 8)
        for mine, theirs in zip(found.layers[0].update(*token), wanted.layers[0].update(*token), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("cache", [None, (), object()], ids=["none", "tuple", "another"])
def test_what_is_no_cache_of_layers_stays(cache):
    reserve(cache, LENGTH)


def test_a_class_without_a_cache_is_told():
    with pytest.raises(UnsupportedError, match="--text"):
        cache_of(CausalLMOutput(logits=torch.zeros(1)))
