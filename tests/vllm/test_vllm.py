"""vLLM's real engine on the CPU gives the tokens of transformers; one process for each engine, as vLLM likes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import edit_config, save_pair
from transformers import AutoModelForCausalLM

import qpalette  # noqa: F401 - registers the method

pytestmark = pytest.mark.vllm

TOKENS = 12
PROMPTS = [list(range(1, 13)), [7, 3, 150], [99, 5, 5, 5, 31, 2, 140], list(range(60, 20, -1))]
SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 160, "tie_word_embeddings": False}
# One fused layer holds three families, and a linear that stays as it is.
SPECS = {"q_proj": "nuq-4", "k_proj": "tcq-2-L12", "v_proj": None, "gate_proj": "nuq-4", "up_proj": "vq-2"}


def spec_of(name: str) -> str | None:
    return SPECS.get(name.rpartition(".")[2], "nuq-4")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Packed head and biases included; the blocks of 32 divide every input of two ranks."""
    directory = tmp_path_factory.mktemp("mixed")
    return save_pair(directory, "llama-bias", spec_of, rotate="block-32", **SIZES)[0]


def engine(model: Path, *, backend: str = "ref", check: bool = True, **options: object) -> subprocess.CompletedProcess:
    options = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "tokens": TOKENS} | options
    command = [sys.executable, Path(__file__).with_name("engine.py"), model, json.dumps(options), json.dumps(PROMPTS)]
    environment = os.environ | {"QPALETTE_BACKEND": backend}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def tokens_of(result: subprocess.CompletedProcess) -> list[list[int]]:
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wanted(mixed) -> list[list[int]]:
    """By transformers with the plain definitions."""
    os.environ["QPALETTE_BACKEND"] = "ref"
    model = AutoModelForCausalLM.from_pretrained(mixed)
    del os.environ["QPALETTE_BACKEND"]
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def test_one_fused_layer_of_several_quantizers(mixed, wanted):
    assert tokens_of(engine(mixed)) == wanted


def test_two_ranks(mixed, wanted):
    assert tokens_of(engine(mixed, tensor_parallel_size=2)) == wanted


def test_compiled_and_from_the_cache_of_another_backend(mixed, wanted, tmp_path, monkeypatch):
    """The codes' layout is a constant of the compiled graph; the cache must tell the two apart."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert tokens_of(engine(mixed, enforce_eager=False)) == wanted
    assert tokens_of(engine(mixed, enforce_eager=False, backend="cpu")) == wanted


def test_a_rotation_that_two_ranks_cannot_share_is_refused(tmp_path):
    packed, _ = save_pair(tmp_path, "llama", rotate="full", **SIZES)
    result = engine(packed, check=False, tensor_parallel_size=2)
    assert result.returncode != 0
    assert "o_proj: tensor parallelism gives each rank 64 of 128 inputs" in result.stderr
    assert "tensor_parallel_size=1, or quantize with --rotation block-64" in result.stderr


def test_a_broken_artifact_is_refused(tmp_path):
    packed, _ = save_pair(tmp_path, "llama", **SIZES)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    config["linears"]["model.layers.0.mlp.up_proj"]["spec"] = "nuq-5"
    edit_config(packed, quantization_config=config)
    result = engine(packed, check=False)
    assert result.returncode != 0
    assert "tensor 'model.layers.0.mlp.up_proj.qp_codes' is" in result.stderr
