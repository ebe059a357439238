"""A model that goes on from one of its layers: the same logits as from its beginning, or it begins there."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qpalette.calibration.continued import Continued
from qpalette.calibration.sensitivity import Divergence

LAYERS = 7
WINDOWS = list(torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS)).eval()


def read(model: LlamaForCausalLM, parts: int) -> Continued:
    continued = Continued(model, WINDOWS, parts)
    for index in range(len(WINDOWS)):
        continued.first(index)
    return continued


@torch.no_grad()
def change(model: LlamaForCausalLM, layer: int) -> list[torch.nn.Parameter]:
    parameter = model.model.layers[layer].mlp.up_proj.weight
    parameter.mul_(1.5)
    return [parameter]


def runs_of(model: LlamaForCausalLM, work) -> list[int]:
    """Layers whose attention runs meanwhile."""
    seen: list[int] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, place=place: seen.append(place))
        for place, layer in enumerate(model.model.layers)
    ]
    work()
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("layer", [0, 1, 3, 6])
def test_the_logits_are_those_of_the_whole_model(model, parts, layer):
    continued = read(model, parts)
    changed = change(model, layer)
    for index, window in enumerate(WINDOWS):
        assert torch.equal(continued.logits(index, changed), model(window[None]).logits[0])


def test_layers_below_what_changed_do_not_run(model):
    continued = read(model, LAYERS)
    changed = change(model, 4)
    assert runs_of(model, lambda: continued.logits(0, changed)) == [*range(LAYERS), *range(4, LAYERS)]  # it is tried
    assert runs_of(model, lambda: continued.logits(1, changed)) == [4, 5, 6]
    assert runs_of(model, lambda: continued.logits(2, changed)) == [4, 5, 6]
    changed += change(model, 2)
    tried = [*range(LAYERS), *range(2, LAYERS)]
    assert runs_of(model, lambda: continued.logits(1, changed)) == [*tried, *range(2, LAYERS)]
    assert runs_of(model, lambda: continued.logits(2, changed)) == [*range(2, LAYERS)]
    assert runs_of(model, lambda: model(WINDOWS[0][None])) == [*range(LAYERS)]


@pytest.mark.parametrize("where", ["model.embed_tokens", "lm_head"])
def test_what_is_no_layers_changes_all(model, where):
    continued = read(model, 3)
    changed = [model.get_submodule(where).weight]
    assert runs_of(model, lambda: continued.logits(1, [*changed, *change(model, 6)])) == [*range(LAYERS)]
    assert runs_of(model, lambda: continued.logits(1, ())) == [*range(LAYERS)]


@torch.no_grad()
def test_layers_that_know_more_of_each_other_are_run_as_a_whole(model):
    """As shared keys and values are known: the sixth layer hears something of the second."""
    notes: list[torch.Tensor] = []
    first, last = model.model.layers[1].self_attn, model.model.layers[5]
    first.register_forward_hook(lambda *call: notes.append(call[-1][0]))
    last.register_forward_hook(lambda *call: call[-1] + notes.pop())
    continued = read(model, LAYERS)
    changed = change(model, 3)
    assert torch.equal(continued.logits(0, changed), model(WINDOWS[0][None]).logits[0])
    assert runs_of(model, lambda: continued.logits(1, changed)) == [*range(LAYERS)]
    assert torch.equal(continued.logits(2, changed), model(WINDOWS[2][None]).logits[0])


def test_divergence_from_a_layer_on(model):
    divergence, whole = Divergence(model, WINDOWS, LAYERS), Divergence(model, WINDOWS, 1)
    changed: list[torch.nn.Parameter] = []
    for layer in (5, 2, 6, 0):
        changed += change(model, layer)
        assert divergence.measure(changed) == whole.measure() > 0
