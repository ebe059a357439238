"""vLLM's real engine on the CPU gives the tokens of transformers; one process for each engine, as vLLM likes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import edit_config, pack, save_pair
from transformers import AutoModelForCausalLM

import qpalette  # noqa: F401 - registers the method
from qpalette.core.errors import ArtifactError, UnsupportedError
from qpalette.core.records import LinearRecord
from qpalette.nn import QuantLinear
from qpalette.rotate import rotation_for

pytest.importorskip("vllm.config", reason="vllm has an environment of its own: python3 dev.py test-vllm")
from qpalette.integrations.vllm import QPaletteVllmConfig, Share, _cut

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


def test_a_rank_holds_its_own_tiles():
    """Slicing first and decoding then gives the same weights as the other way round."""
    torch.manual_seed(0)
    record = pack(torch.randn(96, 128), "x", "nuq-4", rotate="block-32")
    share = Share(rows=((16, 32), (64, 16)), column=64, columns=64)
    share.check("x", record.record)
    cut = {suffix: _cut(suffix, tensor, share) for suffix, tensor in record.tensors.items()}
    whole = QuantLinear(record.record)
    part = QuantLinear(replace(record.record, out_features=48, in_features=64))
    for layer, tensors in ((whole, record.tensors), (part, cut)):
        layer.load_state_dict(tensors)
    weight = whole.dequantize(torch.float32).weight
    rows = torch.cat([weight[16:48], weight[64:80]])
    assert torch.equal(part.dequantize(torch.float32).weight, rows[:, 64:])


@pytest.mark.parametrize(
    ("rotate", "share", "message"),
    [
        ("full", Share(((0, 96),), 64, 64), "64 of 128 inputs, .* 'h128' mixes in blocks of 128; .* block-64"),
        ("block-8", Share(((0, 96),), 0, 8), "8 of 128 inputs"),
        ("block-32", Share(((24, 24),), 0, 128), "24 of 96 rows are not whole tiles of 16"),
    ],
)
def test_what_ranks_cannot_share_is_refused(rotate, share, message):
    record = LinearRecord("nuq-4", 96, 128, rotation_for(128, rotate).name, 0)
    with pytest.raises(UnsupportedError, match=message):
        share.check("o_proj", record)


def test_a_broken_artifact_is_refused(tmp_path):
    packed, _ = save_pair(tmp_path, "llama", **SIZES)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    config["linears"]["model.layers.0.mlp.up_proj"]["spec"] = "nuq-5"
    edit_config(packed, quantization_config=config)
    with pytest.raises(ArtifactError, match=r"tensor 'model\.layers\.0\.mlp\.up_proj\.qp_codes' is"):
        QPaletteVllmConfig.from_config(config).maybe_update_config(str(packed))
    del config["linears"]["model.layers.0.mlp.up_proj"]["rotation"]
    with pytest.raises(ArtifactError, match="rotation: Field required"):
        QPaletteVllmConfig.from_config(config)
