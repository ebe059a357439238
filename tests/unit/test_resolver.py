"""One way from a name in a checkpoint to a matrix in a model: for loading, calibration and sensitivities alike."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from qpalette.calibration.taps import Taps, one_expert_at_a_time, weights_of
from qpalette.core.errors import CheckpointError
from qpalette.models import find_groups, read_weight, tensors_of, transposed_modules
from qpalette.models.forward import forward_on_meta
from qpalette.models.model_class import build_on_meta, class_name
from qpalette.models.resolver import places_of
from qpalette.models.sources import Sources
from qpalette.storage import open_checkpoint

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2},  # Conv1D: in_features x out_features
    "mixtral": MOE,  # a tensor for each expert
    "granitemoe": MOE,  # stacks that the class renames
    "gpt_oss": MOE | {"layer_types": ["full_attention"] * 2},  # transposed stacks
    "hrm_text": {"num_layers_per_stack": 2},  # gate and up, q, k, v and a gate in one tensor
}


def saved(kind: str, directory):
    """(checkpoint, model) of a random model, saved as transformers does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | KINDS[kind])).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return open_checkpoint(directory), model


def linears(checkpoint) -> list[str]:
    return [linear.name for group in find_groups(checkpoint).groups for linear in group.linears]


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_is_what_the_model_multiplies_by(kind, tmp_path):
    """Read from the file, found in the model, and seen in a product: three times the same matrix."""
    checkpoint, model = saved(kind, tmp_path)
    names = linears(checkpoint)
    weights = weights_of(model, names)
    products: dict[str, float] = {}

    def seen(name: str, x: torch.Tensor, y: torch.Tensor, rows: slice) -> None:
        wanted = x.double() @ read_weight(checkpoint, name).double().T
        products[name] = float((y[..., rows].double() - wanted).abs().max() / (wanted.abs().max() + 1e-9))

    biased = kind in ("gpt2", "gpt_oss")
    for module in model.modules() if biased else ():
        for leaf, parameter in module.named_parameters(recurse=False):
            if "bias" in leaf:
                parameter.data.zero_()
    with torch.no_grad(), one_expert_at_a_time(model), Taps(weights, seen):
        model(torch.arange(3, 60)[None], use_cache=False)
    for name in names:
        assert torch.equal(read_weight(checkpoint, name), weights[name].values), name
    assert products.keys() == set(names)
    assert max(products.values()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_gives_the_tensors_of_the_file(kind, tmp_path):
    checkpoint, model = saved(kind, tmp_path)
    sources = Sources(model, {name: tensors_of(checkpoint, name) for name in linears(checkpoint)})
    assert sources.tensors
    for tensor in sources.tensors:
        assert torch.equal(sources.read(tensor, lambda name: read_weight(checkpoint, name)), checkpoint.read(tensor))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_hold_their_inputs_as_rows(kind, tmp_path):
    checkpoint, _ = saved(kind, tmp_path)
    names = linears(checkpoint)
    assert transposed_modules(checkpoint, names) == (names if kind == "gpt2" else [])


def test_names_from_before_a_class_was_renamed():
    """Multimodal checkpoints say language_model.model.layers, their class model.language_model.layers."""
    text = SIZES | {"sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))
    old = [f"language_model.model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"]
    places = places_of(model, old)
    assert [places[name].module for name in old] == [
        name.replace("language_model.model", "model.language_model") for name in old
    ]
    assert class_name(model.config.to_dict() | {"architectures": [type(model).__name__]}) == "AutoModelForCausalLM"


def test_a_linear_is_the_same_asked_for_alone_or_with_all(tmp_path):
    checkpoint, model = saved("mixtral", tmp_path)
    names = linears(checkpoint)
    together = places_of(model, names)
    assert all(places_of(model, [name])[name] == together[name] for name in names)


def test_a_name_that_the_model_has_not(tmp_path):
    _, model = saved("mixtral", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weight 'model\.layers\.7\.self_attn\.q_proj\.weight'"):
        weights_of(model, ["model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj"])


def test_weights_that_a_class_computes_with_itself():
    model = build_on_meta({"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64})
    seen = forward_on_meta(model)
    assert seen.failure is None
    divided = ("attention.output", "feed_forward.value")
    assert seen.computed_outside == {f"rwkv.blocks.{n}.{name}" for n in (0, 1) for name in divided}
