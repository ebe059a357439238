"""Grouped attention is transformers' own: same values in one step, same tokens in generate."""

from __future__ import annotations

import pytest
import torch
from tiny_model import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qpalette.core.errors import UnsupportedError
from qpalette.generation import fast
from qpalette.integrations.attention import grouped


def model(implementation: str) -> nn.Module:
    result = build("llama")
    result.set_attn_implementation(implementation)
    return result


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generates_the_same_tokens(cache):
    prompt = torch.arange(1, 13).reshape(2, 6)
    padded = torch.ones_like(prompt)
    padded[0, :2] = 0  # the mask is of use
    options = {"attention_mask": padded, "max_new_tokens": 10, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(model("grouped").generate(prompt, **options), model("sdpa").generate(prompt, **options))


@pytest.mark.parametrize("boolean", [True, False])
def test_values_are_those_of_sdpa(boolean):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 8)
    allowed = torch.rand(2, 1, 1, 20) > 0.3
    mask = allowed if boolean else torch.zeros(2, 1, 1, 20).masked_fill(~allowed, torch.finfo(torch.float32).min)
    module = nn.Module()
    module.num_key_value_groups = 3
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    result, weights = grouped(module, query, key, value, mask, scaling=0.3)
    assert (result.shape, weights) == (wanted.shape, None)
    # A score adds 16 products of at most max|q| max|k|, a result 20 values of at most max|v| whose weights sum to 1;
    # an error e of a score changes a weight by the factor 1 + 2e.
    unit = torch.finfo(torch.float32).eps
    score = 16 * 0.3 * float(query.abs().max() * key.abs().max()) * 16 * unit
    assert (result - wanted).abs().max() <= (2 * score + 20 * unit) * float(value.abs().max())


def test_refuses_what_it_would_leave_out():
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 3, 8)
    module, mask = nn.Module(), torch.ones(1, 1, 1, 3, dtype=torch.bool)
    module.num_key_value_groups = 2
    with pytest.raises(UnsupportedError, match="no attention sinks"):
        grouped(module, query, key, key, mask, s_aux=torch.zeros(4))
    for tokens in (1, 3):
        with pytest.raises(ValueError, match="softcap"):
            grouped(module, query.expand(1, 4, tokens, 8), key, key, mask, softcap=30.0)


def test_prefill_goes_to_sdpa_itself():
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    module = nn.Module()
    module.num_key_value_groups = 2
    module.is_causal = True
    wanted, _ = sdpa_attention_forward(module, query, key, key, None)
    assert torch.equal(grouped(module, query, key, key, None)[0], wanted)


class _Largest(TorchDispatchMode):
    """Of the new tensors that are made: numbers in memory of their own."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        for made in tree_leaves(result):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, made.numel())
        return result


def test_nothing_is_as_large_as_the_keys():
    """Whatever transformers' own attention does for a group of queries, a step reads its cache in place."""
    query, key = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 200, 16)
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    with _Largest() as largest:
        grouped(nn.Module(), query, key, key, mask)
    assert query.numel() <= largest.numbers < key.numel() // 2


@pytest.mark.parametrize(("implementation", "wanted"), [("sdpa", "grouped"), ("eager", "eager")])
def test_a_fast_model_on_a_cpu_shares_keys(implementation, wanted):
    assert fast(model(implementation)).config._attn_implementation == wanted
