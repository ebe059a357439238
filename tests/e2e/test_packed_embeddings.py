"""Embeddings and output heads, packed when asked for: the same model as its dequantized tables, tied or not."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import qpalette
from qpalette.core.errors import CheckpointError
from qpalette.formats import open_artifact
from qpalette.models import find_groups
from qpalette.nn import QuantEmbedding, QuantLinear, TiedHead
from qpalette.pipeline import estimate, quantize_checkpoint
from qpalette.plan import Plan
from qpalette.storage import open_checkpoint
from qpalette.storage.tied import with_own_head

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.arange(1, 13)[None]
SIZES = {
    "vocab_size": 120,  # no multiple of 16
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def write(directory: Path, kind: str, tied: bool) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=tied))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # logits far apart, so that greedy tokens mean something
    model.save_pretrained(directory)
    return directory


CASES = {
    "tied": ("llama", True, ["lm_head"], [EMBEDDING]),
    "tied and scaled": ("gemma3_text", True, ["embed_tokens"], [EMBEDDING]),
    "both": ("qwen2", False, ["lm_head", "model.embed*"], [EMBEDDING, HEAD]),
    "head alone": ("qwen2", False, ["lm_head"], [HEAD]),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(source, quantized directory, what was packed besides the decoder)."""
    kind, tied, also, packed = CASES[request.param]
    folder = tmp_path_factory.mktemp("embeddings")
    qpalette.quantize(write(folder / "source", kind, tied), folder / "out", spec="nuq-4", also=also)
    return folder / "source", folder / "out", packed


def load(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def tolerance(model: nn.Module, wanted: torch.Tensor) -> float:
    """First-order bound of the rounding along the path: each product of K terms adds K roundings."""
    terms = sum(m.record.in_features for m in model.modules() if hasattr(m, "record"))
    return torch.finfo(torch.float32).eps * terms * float(wanted.abs().max())


def test_the_named_ones_are_packed_and_nothing_is_lost(case):
    source, out, packed = case
    artifact, original = open_artifact(out), load_file(source / "model.safetensors")
    assert set(packed) == {name for name in artifact.records if "layers" not in name}
    assert {name for name in original if name.removesuffix(".weight") not in artifact.records} == {
        name for name in artifact.stored if ".qp_" not in name
    }
    left = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert not set(left) & set(packed)


def test_logits_are_those_of_the_dequantized_tables(case):
    _, out, packed = case
    model = load(out)
    assert isinstance(model.model.embed_tokens, QuantEmbedding) == (EMBEDDING in packed)
    kind = QuantLinear if HEAD in packed else TiedHead
    assert isinstance(model.lm_head, kind)
    result = logits(model)
    bound = tolerance(model, result)
    ordinary = load(out).dequantize()
    assert (result - logits(ordinary)).abs().max() <= bound
    tied = ordinary.lm_head.weight is ordinary.model.embed_tokens.weight
    assert tied == (kind is TiedHead)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), ordinary.generate(IDS, **options))


def test_a_dequantized_model_saves_and_loads(case, tmp_path):
    _, out, _ = case
    ordinary = load(out).dequantize()
    ordinary.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(ordinary))


def test_save_and_reload_is_bit_exact(case, tmp_path):
    _, out, _ = case
    model = load(out)
    model.tie_weights()  # whoever calls it changes nothing
    model.save_pretrained(tmp_path)
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_types_copies_and_base_models(case):
    _, out, packed = case
    model = load(out, dtype=torch.bfloat16)
    if EMBEDDING in packed:
        assert model.model.embed_tokens(IDS).dtype == torch.bfloat16
        wanted = load(out).dequantize(torch.bfloat16).model.embed_tokens(IDS)
        # The float32 row is rounded once in either; computed in another order it may land on the neighbour.
        spacing = torch.finfo(torch.bfloat16).eps * wanted.abs().float() + 1e-6
        assert ((model.model.embed_tokens(IDS) - wanted).abs() <= 2 * spacing).all()
    twin = copy.deepcopy(load(out))
    assert torch.equal(logits(twin), logits(load(out)))
    if isinstance(twin.lm_head, TiedHead):
        assert twin.lm_head.embedding is twin.model.embed_tokens
    base = AutoModel.from_pretrained(out)
    assert isinstance(base.embed_tokens, QuantEmbedding) == (EMBEDDING in packed)


def test_lookups_in_every_layout_and_in_chunks(case, monkeypatch):
    _, out, packed = case
    if EMBEDDING not in packed:
        return
    embedding = load(out).model.embed_tokens
    ids = torch.tensor([[0, 119, 3], [64, 64, 17]])
    table = embedding.dequantized_weight()[ids] * embedding.factors[torch.float32]
    bound = torch.finfo(torch.float32).eps * 48 * table.abs().max()
    monkeypatch.setattr("qpalette.nn.quant_embedding.CHUNK_WEIGHTS", 1)
    for backend in ("cpu", "ref"):
        monkeypatch.setenv("QPALETTE_BACKEND", backend)
        embedding.prepare()
        assert (embedding(ids) - table).abs().max() <= bound
    assert embedding(ids[:, :0]).shape == (2, 0, 48)
    with pytest.raises(IndexError):
        embedding(torch.tensor([130]))


def test_forward_compiles_into_one_graph(case):
    model = load(case[1])
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        result = compiled(IDS).logits
    assert (result - logits(model)).abs().max() <= tolerance(model, result)


def test_a_head_stored_beside_its_tied_embedding_keeps_its_own_weight(tmp_path):
    source = write(tmp_path / "source", "llama", tied=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    wanted = load_file(source / "model.safetensors")["lm_head.weight"]
    qpalette.quantize(source, tmp_path / "out", spec="nuq-4", also=["embed_tokens"])
    model = load(tmp_path / "out")
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert torch.equal(model.lm_head.weight, wanted)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_head_that_is_not_its_tied_embedding_is_packed_by_its_own_name(tmp_path, kind, caplog):
    """A model whose head was trained apart, and whose config still says that it was not."""
    source = write(tmp_path / "source", kind, tied=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    qpalette.quantize(source, tmp_path / "out", spec="nuq-6", also=["lm_head"])
    assert "lm_head" in caplog.text
    assert "the head of the file is used" in caplog.text
    artifact = open_artifact(tmp_path / "out")
    assert HEAD in artifact.records
    assert EMBEDDING not in artifact.records
    assert artifact.config["tie_word_embeddings"] is False
    stored, model = load_file(source / "model.safetensors"), load(tmp_path / "out")
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.get_input_embeddings().weight, stored[f"{EMBEDDING}.weight"])
    error = model.lm_head.dequantized_weight() - stored[f"{HEAD}.weight"]
    assert error.norm() < 0.05 * stored[f"{HEAD}.weight"].norm()


def test_a_copy_of_the_embedding_stays_tied(tmp_path):
    source = write(tmp_path / "source", "llama", tied=True)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {f"{HEAD}.weight": tensors[f"{EMBEDDING}.weight"].clone()}, source / "model.safetensors")
    assert open_checkpoint(source).config["tie_word_embeddings"] is True


def test_a_head_of_its_own_in_a_config_of_several_parts():
    inner = {"model_type": "gemma3_text", "tie_word_embeddings": True}
    config = {"model_type": "gemma3", "text_config": inner, "tie_word_embeddings": True}
    names = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    untied = with_own_head(config, names, lambda head, embedding: False)
    assert (untied["tie_word_embeddings"], untied["text_config"]["tie_word_embeddings"]) == (False, False)
    assert with_own_head(config, names, lambda head, embedding: True) == config
    assert with_own_head(config, names[:1], lambda head, embedding: False) == config


def test_a_plan_may_name_them(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "source", "llama", tied=True))
    grouping = find_groups(checkpoint)
    assert [group.name for group in grouping.optional] == [EMBEDDING]
    assert grouping.reasons[f"{EMBEDDING}.weight"] == "embedding"
    plan = Plan({EMBEDDING: "nuq-6", "model.layers.0.mlp.up_proj": "nuq-2"})
    expected = estimate(checkpoint, plan)
    report = quantize_checkpoint(checkpoint, tmp_path / "out", plan)
    assert expected.bits == report.bits
    assert {linear.name: linear.record.spec for linear in report.linears} == plan.specs


def test_a_name_that_matches_nothing(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "source", "llama", tied=True))
    with pytest.raises(CheckpointError, match=r"'head' matches no embedding.*model\.embed_tokens"):
        find_groups(checkpoint, also=["head"])
