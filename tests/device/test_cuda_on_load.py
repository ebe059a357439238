"""Quantizing while transformers loads onto a GPU: encoded there, run there."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qpalette
from qpalette.integrations import on_load
from qpalette.nn import QuantLinear

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("device_map", ["cuda", {"": 0}, "auto"])
def test_it_is_encoded_and_runs_on_the_gpu(tmp_path, monkeypatch, device_map):
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "cache"))
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).half().save_pretrained(tmp_path / "source")
    devices, copy = [], on_load.quantized_copy

    def noted(checkpoint, *, device, **options):
        devices.append(torch.device(device).type)
        return copy(checkpoint, device=device, **options)

    monkeypatch.setattr(on_load, "quantized_copy", noted)
    config = qpalette.Config(bits=4, effort="fast")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config, device_map=device_map)
    assert devices == ["cuda"]
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantLinear)
    ids = torch.arange(30, device="cuda")[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source", device_map="cuda")
    with torch.inference_mode():
        error = model(ids).logits.float() - plain(ids).logits.float()
        assert error.norm() < 0.3 * plain(ids).logits.float().norm()
