"""The files that benchmarks write for llama.cpp's tools say what the checkpoints say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from qpalette.evaluate import load_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gguf_files

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_the_same_model_as_a_file(kind: Any, tied: bool, tmp_path: Path) -> None:
    """Read again as any GGUF file is, whose heads are in llama.cpp's order."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, tie_word_embeddings=tied), trust_remote_code=False).eval()
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).half().float()
    model.save_pretrained(tmp_path / "model")
    gguf_files.write_checkpoint(tmp_path / "model", tmp_path / "model.gguf")
    ids = torch.randint(96, (1, 24))
    with torch.no_grad():
        read = load_model(tmp_path / "model.gguf")[0](ids).logits
        assert torch.allclose(read, model(ids).logits, atol=1e-4)
