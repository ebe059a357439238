"""Groups against real model classes on the meta device: the table names every linear of every architecture in it."""

import re
from collections.abc import Mapping

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qpalette.core.errors import CheckpointError
from qpalette.models import find_groups, tensor_of
from qpalette.models.groups import ARCHITECTURES
from qpalette.storage import Checkpoint, TensorInfo

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 11,  # two digits: layer 10 must come after layer 9
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 48,
    "pad_token_id": 0,
}


class Headers(Checkpoint):
    """A checkpoint that is nothing but its headers."""

    format = "headers"
    files = ()

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: dict, dtype: torch.dtype = torch.float16) -> None:
        self.tensors = {name: TensorInfo(name, tuple(shape), dtype) for name, shape in shapes.items()}
        self.config = config

    def read(self, name):
        raise AssertionError("groups need no weights")

    def save_side_files(self, directory):
        raise AssertionError("groups need no side files")


def meta_model(model_type: str) -> tuple[torch.nn.Module, dict]:
    sizes = {"text_config": SIZES} if model_type == "gemma3" else SIZES
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(config, "text_config", config))
    return model, config.to_dict()


def checkpoint_of(model_type: str) -> tuple[Headers, torch.nn.Module]:
    model, config = meta_model(model_type)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return Headers(shapes, config), model


def names(grouping) -> list[str]:
    return [linear.name for group in grouping.groups for linear in group.linears]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_decoder_linear_of_the_model_class_is_grouped(model_type):
    checkpoint, model = checkpoint_of(model_type)
    grouping = find_groups(checkpoint)
    linears = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    assert {name for name in names(grouping) if ".experts." not in name} == linears
    holding = {tensor_of(checkpoint, name) for name in names(grouping)}
    assert holding | set(grouping.untouched) == set(checkpoint.tensors)
    assert len(holding) + len(grouping.untouched) == len(checkpoint.tensors)
    assert grouping.reasons["model.embed_tokens.weight"] == "embedding"
    for group in grouping.groups:
        for linear in group.linears:
            held = checkpoint.tensors[tensor_of(checkpoint, linear.name)].shape
            assert sorted(held[-2:]) == sorted((linear.out_features, linear.in_features))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_grouped_linears_receive_the_same_tensor(model_type):
    """Run the model class itself, and compare what each linear was given."""
    checkpoint, model = checkpoint_of(model_type)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), use_cache=False)
    for group in find_groups(checkpoint).groups:
        if ".experts." not in group.name:  # those are no nn.Linear in the model class
            assert all(inputs[linear.name] is inputs[group.linears[0].name] for linear in group.linears)


def experts_of(model_type: str, names: Mapping[str, tuple[int, int]]) -> Headers:
    """A layer with two experts under their names of the hub."""
    prefix = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    shapes = {f"model.layers.0.{prefix}.experts.{e}.{name}.weight": s for e in (1, 0) for name, s in names.items()}
    return Headers(shapes, AutoConfig.for_model(model_type, **SIZES).to_dict())


@pytest.mark.parametrize(
    ("model_type", "leaves"),
    [("mixtral", ("w1", "w3", "w2")), ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"))],
)
def test_first_linears_of_all_experts_are_one_group(model_type, leaves):
    gate, up, down = leaves
    groups = find_groups(experts_of(model_type, {down: (32, 64), up: (64, 32), gate: (64, 32)})).groups
    members = [[linear.name.rpartition("experts.")[2] for linear in group.linears] for group in groups]
    assert members == [[f"0.{down}"], [f"1.{down}"], [f"0.{gate}", f"0.{up}", f"1.{gate}", f"1.{up}"]]


def test_stacked_experts_are_transposed_where_the_model_class_says_so():
    config = AutoConfig.for_model("gpt_oss", **SIZES, num_local_experts=2).to_dict()
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (2, 32, 128),
        "model.layers.0.mlp.experts.down_proj": (2, 64, 32),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (2, 128),
        "model.layers.1.mlp.experts.down_proj": (3, 64, 32),
    }
    grouping = find_groups(Headers(shapes, config))
    linears = [linear for group in grouping.groups for linear in group.linears]
    found = {x.name.partition("experts.")[2]: (x.out_features, x.in_features) for x in linears}
    assert found == {
        "0.gate_up_proj": (128, 32),
        "1.gate_up_proj": (128, 32),
        "0.down_proj": (32, 64),
        "1.down_proj": (32, 64),
    }
    assert grouping.reasons == {
        "model.layers.0.mlp.experts.gate_up_proj_bias": "2 dimensions, or no weight",
        "model.layers.1.mlp.experts.down_proj": "3 dimensions, or no weight",
    }


def test_without_a_table_the_model_class_decides():
    config = AutoConfig.for_model("glm4", **SIZES).to_dict()
    shapes = {
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
        "model.layers.0.self_attn.q_proj.weight": (48, 32),
        "model.layers.0.self_attn.novel.weight": (32, 32),
        "model.layers.0.input_layernom.weight": (32, 32),
    }
    grouping = find_groups(Headers(shapes, config))
    assert names(grouping) == ["model.layers.0.self_attn.o_proj"]
    reasons = {"no module of the model class", "of another shape than the model class has"}
    assert set(grouping.reasons.values()) == reasons


def test_layers_and_members_are_in_the_order_of_computation():
    checkpoint, _ = checkpoint_of("llama")
    checkpoint.tensors = dict(sorted(checkpoint.tensors.items(), key=lambda item: item[0][::-1]))
    groups = find_groups(checkpoint).groups
    assert [group.name for group in groups[:4]] == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert [linear.name[-6:] for linear in groups[0].linears] == ["q_proj", "k_proj", "v_proj"]
    layers = [int(re.search(r"layers\.(\d+)", group.name)[1]) for group in groups]
    assert layers == sorted(layers)
    assert layers[-1] == 10


def test_include_and_exclude():
    checkpoint, _ = checkpoint_of("llama")
    grouping = find_groups(checkpoint, include=["*.mlp.*", "*.k_proj"], exclude=["*.layers.0.*", "*.down_proj"])
    assert [group.name for group in grouping.groups[:2]] == [
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.1.mlp.gate_up_proj",
    ]
    assert [linear.name for linear in grouping.groups[0].linears] == ["model.layers.1.self_attn.k_proj"]
    assert grouping.reasons["model.layers.0.mlp.up_proj.weight"] == "excluded"
    assert grouping.reasons["model.layers.1.self_attn.q_proj.weight"] == "not included"


def test_an_unknown_architecture_gives_one_group_per_linear():
    shapes = {
        "model.embed_tokens.weight": (48, 32),
        "model.layers.10.mlp.experts.2.up.weight": (64, 32),
        "model.layers.10.mlp.experts.10.up.weight": (64, 32),
        "model.layers.9.mixer.in.weight": (64, 32),
        "model.layers.9.mlp.gate.weight": (16, 32),
        "model.layers.9.mlp.shared_expert_gate.weight": (1, 32),
        "model.layers.9.mixer.tiny.weight": (8, 32),
        "model.layers.9.mixer.conv1d.weight": (32, 1, 4),
        "model.layers.9.mlp.experts.gate_up_proj": (4, 64, 32),
        "model.layers.9.norm.weight": (32,),
        "model.layers.9.mixer.in.bias": (64,),
        "mtp.layers.0.foo.weight": (32, 32),
        "model.layers.12.eh_proj.weight": (32, 64),
        "model.vision_tower.layers.0.fc.weight": (32, 32),
        "head.weight": (48, 32),
        "lm_head.weight": (48, 32),
    }
    grouping = find_groups(Headers(shapes, {"model_type": "novel", "num_hidden_layers": 12}))
    assert [group.name for group in grouping.groups] == [
        "model.layers.9.mixer.in",
        "model.layers.10.mlp.experts.2.up",
        "model.layers.10.mlp.experts.10.up",
    ]
    assert all(len(group.linears) == 1 for group in grouping.groups)
    assert len(grouping.untouched) == len(shapes) - 3
    reasons = {name.removesuffix(".weight"): reason for name, reason in grouping.reasons.items()}
    assert reasons == {
        "model.embed_tokens": "embedding",
        "model.layers.9.mlp.gate": "router or gate",
        "model.layers.9.mlp.shared_expert_gate": "router or gate",
        "model.layers.9.mixer.tiny": "smaller than 16 x 16",
        "model.layers.9.mixer.conv1d": "3 dimensions, or no weight",
        "model.layers.9.mlp.experts.gate_up_proj": "3 dimensions, or no weight",
        "mtp.layers.0.foo": "multi-token-prediction head",
        "model.layers.12.eh_proj": "a layer beyond the decoder's (multi-token prediction)",
        "model.vision_tower.layers.0.fc": "not the language model",
        "head": "not in a numbered layer",
        "lm_head": "output head",
    }


def test_what_is_no_plain_linear_is_left_alone():
    linear = "model.layers.0.mlp.up_proj.weight"
    for config, dtype, reason in (
        ({"model_type": "gpt2"}, torch.float16, "stored transposed (Conv1D)"),
        ({"model_type": "llama"}, torch.float8_e4m3fn, "stored as torch.float8_e4m3fn"),
    ):
        grouping = find_groups(Headers({linear: (32, 32)}, config, dtype))
        assert (grouping.groups, grouping.untouched, grouping.reasons) == ((), (linear,), {linear: reason})
    odd = "model.layers.0.self_attn.novel_proj.weight"
    assert find_groups(Headers({odd: (32, 32)}, {"model_type": "llama"})).reasons == {
        odd: "no linear of the llama table"
    }


def test_siblings_that_cannot_share_an_input():
    shapes = {"model.layers.0.mlp.gate_proj.weight": (64, 32), "model.layers.0.mlp.up_proj.weight": (64, 48)}
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.gate_up_proj: .* must read the same input"):
        find_groups(Headers(shapes, {"model_type": "llama"}))
