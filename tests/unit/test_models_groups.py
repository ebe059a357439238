"""Groups against real model classes: every linear is found, and those of a group are given one tensor when it runs."""

import re
from collections.abc import Mapping

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qpalette.core.errors import CheckpointError
from qpalette.models import find_groups, tensors_of
from qpalette.models.resolver import NO_CLASS, resolve
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


ARCHITECTURES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3", "gemma3_text", "gpt_oss", "olmo2"),
    *("phi3", "glm4", "gemma2", "starcoder2", "granite"),
)


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
    return model, model.config.to_dict()


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
    holding = {tensor for name in names(grouping) for tensor in tensors_of(checkpoint, name)}
    assert holding | set(grouping.untouched) == set(checkpoint.tensors)
    assert len(holding) + len(grouping.untouched) == len(checkpoint.tensors)
    assert grouping.reasons["model.embed_tokens.weight"] == "embedding"
    for group in grouping.groups:
        for linear in group.linears:
            held = checkpoint.tensors[tensors_of(checkpoint, linear.name)[0]].shape
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
        "model.layers.1.mlp.experts.down_proj": "of another shape than the model class has",
    }


def test_what_the_class_has_not_stays():
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


def test_nothing_of_a_model_without_a_class():
    shapes = {"model.layers.0.mixer.in.weight": (64, 32), "model.norm.weight": (32,)}
    grouping = find_groups(Headers(shapes, {"model_type": "novel", "num_hidden_layers": 12}))
    assert (grouping.groups, grouping.untouched) == ((), tuple(shapes))
    assert grouping.reasons == {"model.layers.0.mixer.in.weight": NO_CLASS}


@pytest.mark.parametrize(
    "damage", [{"num_hidden_layers": 10**9}, {"num_local_experts": 10**9}, {"text_config": {"n_layers": 10**9}}]
)
def test_a_corrupt_count_builds_nothing(damage):
    config = AutoConfig.for_model("jetmoe", **SIZES).to_dict() | damage
    assert resolve(Headers({"model.norm.weight": (32,)}, config)).model is None


def test_why_a_matrix_stays_as_it_is():
    config = AutoConfig.for_model("qwen2_moe", **SIZES, num_experts=4, shared_expert_intermediate_size=16).to_dict()
    layer = "model.layers.9"
    shapes = {
        "model.embed_tokens.weight": (48, 32),
        f"{layer}.mlp.gate.weight": (4, 32),
        f"{layer}.mlp.shared_expert_gate.weight": (1, 32),
        f"{layer}.mlp.shared_expert.gate_proj.weight": (16, 32),
        f"{layer}.self_attn.conv1d.weight": (32, 1, 4),
        "mtp.layers.0.foo.weight": (32, 32),
        "model.layers.12.eh_proj.weight": (32, 64),
        "lm_head.weight": (48, 32),
    }
    grouping = find_groups(Headers(shapes, config))
    assert names(grouping) == [f"{layer}.mlp.shared_expert.gate_proj"]
    assert {name.removesuffix(".weight"): reason for name, reason in grouping.reasons.items()} == {
        "model.embed_tokens": "embedding",
        f"{layer}.mlp.gate": "router or gate",
        f"{layer}.mlp.shared_expert_gate": "smaller than 16 x 16",
        f"{layer}.self_attn.conv1d": "no module of the model class",
        "mtp.layers.0.foo": "multi-token-prediction head",
        "model.layers.12.eh_proj": "a layer beyond the decoder's (multi-token prediction)",
        "lm_head": "output head",
    }


def test_a_type_that_is_no_weight_is_left_alone():
    linear = "model.layers.0.mlp.up_proj.weight"
    config = AutoConfig.for_model("llama", **SIZES).to_dict()
    grouping = find_groups(Headers({linear: (64, 32)}, config, torch.float8_e4m3fn))
    assert (grouping.groups, grouping.untouched) == ((), (linear,))
    assert grouping.reasons == {linear: "stored as torch.float8_e4m3fn"}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_of_a_wrapped_model_are_refused(prefix):
    checkpoint, _ = checkpoint_of("llama")
    wrapped = Headers({prefix + name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    with pytest.raises(CheckpointError, match=f"begins with '{re.escape(prefix)}'"):
        find_groups(wrapped)


@pytest.mark.parametrize("prefix", ["", "model.", "model.model."])
def test_names_without_the_prefix_of_the_class_are_the_same_modules(prefix):
    checkpoint, _ = checkpoint_of("llama")
    shapes = {prefix + name.removeprefix("model."): info.shape for name, info in checkpoint.tensors.items()}
    found = resolve(Headers(shapes, checkpoint.config)).linears
    assert len(found) == len(resolve(checkpoint).linears)
    assert all(held.place.module == f"model.{name.removeprefix(prefix)}" for name, held in found.items())
