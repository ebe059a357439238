"""How much of what multiplies is packed: nothing that a quantizer passes over may hide."""

from __future__ import annotations

import math

import pytest

from qpalette.models.multiplied import Share, shares_of

CONFIG = {"model_type": "unheard_of", "num_hidden_layers": 2}
LAYER = "model.layers.0"
DENSE = {f"{LAYER}.mlp.up_proj": 64 * 32, f"{LAYER}.mlp.down_proj": 64 * 32}


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        (f"{LAYER}.mixer.in_proj.weight", (64, 32), "linears"),
        ("transformer.h.1.attn.c_attn.weight", (32, 96), "linears"),  # Conv1D, stored transposed
        (f"{LAYER}.attn.in_proj_weight", (96, 32), "linears"),  # nn.MultiheadAttention
        ("model.projector.weight", (32, 32), "linears"),
        (f"{LAYER}.mlp.experts.3.w1.weight", (64, 32), "experts"),
        (f"{LAYER}.block_sparse_moe.input_linear.weight", (4, 64, 32), "experts"),  # a naming that no table has
        (f"{LAYER}.ffn.experts.mlp.v1", (4, 64, 32), "experts"),
        ("lm_head.weight", (128, 32), "head"),
        ("model.embed_tokens.weight", (128, 32), "tied embedding"),
        ("model.embed_tokens_per_layer.weight", (128, 32), "embedding"),
        ("transformer.wpe.weight", (128, 32), "embedding"),
        ("model.vision_tower.layers.0.fc1.weight", (64, 32), "other parts"),
        ("mtp.layers.0.proj.weight", (64, 32), "other parts"),
        ("model.layers.2.eh_proj.weight", (64, 32), "other parts"),  # beyond the two of the config
        (f"{LAYER}.mixer.conv1d.weight", (64, 1, 4), None),
        (f"{LAYER}.mixer.A_log", (64, 16), None),
        (f"{LAYER}.mlp.gate.weight", (8, 32), None),
        (f"{LAYER}.input_layernorm.weight", (32,), None),
    ],
)
def test_what_stays_is_counted_by_its_kind(name, shape, kind):
    shares = shares_of(CONFIG, DENSE, {name: shape})
    weights = {"linears": 4096}
    if kind is not None:
        weights[kind] = weights.get(kind, 0) + math.prod(shape)
    assert {kind: share.weights for kind, share in shares.kinds.items()} == weights
    assert {kind: share.packed for kind, share in shares.kinds.items() if share.packed} == {"linears": 4096}
    stays = kind in ("linears", "experts", "head", "tied embedding")
    assert list(shares.staying.values()) == ([math.prod(shape)] if stays else [])


def test_an_embedding_is_looked_up_where_there_is_a_head_and_multiplies_where_there_is_none():
    table = {"model.embed_tokens.weight": (128, 32)}
    tied = shares_of(CONFIG, DENSE, table)
    assert tied.multiplied == Share(4096, 4096 + 128 * 32)
    for packed, kept in (({"lm_head": 128 * 32}, {}), ({}, {"lm_head.weight": (128, 32)})):
        untied = shares_of(CONFIG, DENSE | packed, table | kept)
        assert untied.kinds["embedding"] == Share(0, 128 * 32)
        assert untied.multiplied == Share(4096 + sum(packed.values()), 4096 + 128 * 32)
    packed_table = shares_of(CONFIG, DENSE | {"model.embed_tokens": 128 * 32}, {})
    assert packed_table.multiplied.fraction == 1
    assert packed_table.kinds["tied embedding"] == Share(128 * 32, 128 * 32)


def test_experts_are_packed_one_by_one():
    experts = {f"{LAYER}.mlp.experts.{i}.gate_proj": 64 * 32 for i in range(4)}
    assert shares_of(CONFIG, DENSE | experts, {}).kinds == {"linears": Share(4096, 4096), "experts": Share(8192, 8192)}


def test_below_ninety_percent_a_word_names_what_stays_and_the_way_out():
    assert shares_of(CONFIG, DENSE, {f"{LAYER}.router.weight": (16, 28)}).warning() is None
    kept = {f"model.layers.{i}.moe.input_linear.weight": (4, 64, 32) for i in range(2)}
    warning = shares_of(CONFIG, DENSE, kept).warning()
    assert warning.startswith(
        "only 20 % of what multiplies is packed: model.layers.*.moe.input_linear (16.4 k weights)"
    )
    assert warning.endswith("`qpalette inspect` says why")
    head = shares_of(CONFIG, DENSE, {"lm_head.weight": (128, 32)}).warning()
    assert head.startswith("only 50 % of what multiplies is packed: lm_head (4.1 k weights) stays as it is")
    assert head.endswith("; pack it too with --also lm_head (also=['lm_head'])")


def test_a_hundred_percent_is_all():
    assert str(Share(99_999, 100_000)) == "99.9 %"
    assert str(Share(100_000, 100_000)) == "100 %"
    assert str(Share(0, 5)) == "0 %"
