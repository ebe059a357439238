"""What nothing could load or run is an error before the work."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

import qpalette
from qpalette.core.errors import CheckpointError
from qpalette.models import resolver


@pytest.fixture
def llama(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_model_without_a_class(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "internlm2", "auto_map": {}}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has no class for the model type 'internlm2'"):
        qpalette.quantize(llama, tmp_path / "out", spec="nuq-4")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_the_class_could_not_run(tmp_path, monkeypatch):
    """RWKV divides weights in its forward; here nobody has noticed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    RwkvForCausalLM(RwkvConfig(**sizes)).save_pretrained(tmp_path / "source")
    unnoticed = resolver._seen_by
    monkeypatch.setattr(resolver, "_seen_by", lambda model: replace(unnoticed(model), computed_outside=set()))
    with pytest.raises(CheckpointError, match=r"RwkvForCausalLM could not run the result \(a packed weight cannot be"):
        qpalette.quantize(tmp_path / "source", tmp_path / "out", spec="nuq-4")
    assert not (tmp_path / "out").exists()
