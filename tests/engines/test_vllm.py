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
from test_cli import save_model
from test_serve import ASKED, generated, running
from tiny_model import build, edit_config, pack, save_pair
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import qpalette
from qpalette.core.errors import ArtifactError, UnsupportedError
from qpalette.core.records import LinearRecord
from qpalette.formats import open_artifact
from qpalette.nn import QuantLinear
from qpalette.rotate import rotation_for

pytest.importorskip("vllm.config", reason="vllm has an environment of its own: python3 dev.py test-vllm")
from vllm.config import VllmConfig, set_current_vllm_config

from qpalette.integrations.vllm import QPaletteLinearMethod, QPaletteVllmConfig, _fuse
from qpalette.integrations.vllm_shares import Share, add_to_compile_cache_key, cut

pytestmark = pytest.mark.vllm

TOKENS = 12
PROMPTS = [list(range(1, 13)), [7, 3, 149], [99, 5, 5, 5, 31, 2, 140], list(range(60, 20, -1))]
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


def by_transformers(model_directory: Path) -> list[list[int]]:
    """With the plain definitions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPALETTE_BACKEND", "ref")
        model = AutoModelForCausalLM.from_pretrained(model_directory)
    model.generation_config.eos_token_id = None  # as `ignore_eos` in the engine: random models say any token
    return [
        model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=TOKENS, do_sample=False
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


@pytest.fixture(scope="module")
def wanted(mixed) -> list[list[int]]:
    return by_transformers(mixed)


def test_two_ranks_and_one_fused_layer_of_several_quantizers(mixed, wanted):
    assert tokens_of(engine(mixed, tensor_parallel_size=2)) == wanted


def test_compiled_and_on_the_fast_backend(mixed, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert tokens_of(engine(mixed, enforce_eager=False, backend="cpu")) == wanted


def test_a_compiled_graph_is_not_taken_for_another_backends(monkeypatch):
    keys = set()
    for backend in ("ref", "cpu", "cpu"):
        monkeypatch.setenv("QPALETTE_BACKEND", backend)
        config = VllmConfig()
        with set_current_vllm_config(config):
            add_to_compile_cache_key({"nuq-4"})
        keys.add(config.compute_hash())
    assert len(keys) == 2


def test_a_packed_embedding_and_the_head_tied_to_it(tmp_path):
    """A vocabulary of 150 is neither whole tiles nor what vLLM rounds it up to; the second rank has the rest of it."""
    sizes = SIZES | {"vocab_size": 150, "tie_word_embeddings": True}
    build("llama", **sizes).save_pretrained(tmp_path / "plain")
    out = tmp_path / "out"
    qpalette.quantize(tmp_path / "plain", out, spec="nuq-4", rotation="block-32", also=["lm_head"])
    assert "model.embed_tokens" in open_artifact(out).records
    assert tokens_of(engine(out, tensor_parallel_size=2, skip_tokenizer_init=True)) == by_transformers(out)


MIXTURES = {
    "qwen3_moe": Qwen3MoeConfig(
        **{"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 6},
        **{"num_experts_per_tok": 2, "vocab_size": 160, "norm_topk_prob": True, "initializer_range": 0.2},
    ),
    "mixtral": MixtralConfig(
        **{"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 160},
        **{"initializer_range": 0.2, "sliding_window": None},
    ),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_packed_experts_alone_on_two_ranks_and_whole_on_each(tmp_path, kind):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES[kind]).save_pretrained(tmp_path / "plain")
    qpalette.quantize(tmp_path / "plain", tmp_path / "out", spec="nuq-4", rotation="block-32")
    assert any(".experts." in name for name in open_artifact(tmp_path / "out").records)
    wanted = by_transformers(tmp_path / "out")
    options = {"skip_tokenizer_init": True}
    assert tokens_of(engine(tmp_path / "out", **options)) == wanted
    assert tokens_of(engine(tmp_path / "out", tensor_parallel_size=2, **options)) == wanted
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert tokens_of(engine(tmp_path / "out", **parallel, **options)) == wanted


def test_parts_of_one_basis_run_as_one_launch(monkeypatch):
    torch.manual_seed(0)
    members = [pack(torch.randn(32, 64), "group", spec) for spec in ("nuq-4", "nuq-3")]
    layer = torch.nn.Module()
    layer.packed_parts = torch.nn.ModuleList(QuantLinear(member.record) for member in members)
    for part, member in zip(layer.packed_parts, members, strict=True):
        part.load_state_dict(member.tensors)
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    assert _fuse(list(layer.packed_parts))
    method, x, bias = QPaletteLinearMethod([]), torch.randn(3, 64), torch.randn(64)
    results = []
    for layer.one_launch in (False, True):
        results.append(method.apply(layer, x, bias))
    assert torch.equal(*results)
    layer.packed_parts[1].qp_signs[0] ^= 1
    assert not _fuse(list(layer.packed_parts))


def test_serve_answers_a_client(tmp_path):
    save_model(tmp_path / "plain", hidden_size=128)  # heads of 32: the least that vLLM's attention takes on a CPU
    qpalette.quantize(tmp_path / "plain", tmp_path / "out", spec="nuq-4")
    options = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256")
    with running(tmp_path / "out", "--engine", "vllm", "--", *options) as server:
        (model,) = [model.id for model in server.client.models.list().data]
        whole = server.client.chat.completions.create(model=model, **ASKED)
        chunks = list(server.client.chat.completions.create(model=model, stream=True, **ASKED))
    text = whole.choices[0].message.content
    assert text == generated(tmp_path / "out")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len(chunks) > 2, "streamed means in pieces"


def test_a_rank_holds_its_own_tiles():
    """Slicing first and decoding then gives the same weights as the other way round."""
    torch.manual_seed(0)
    record = pack(torch.randn(96, 128), "x", "nuq-4", rotate="block-32")
    share = Share(rows=((16, 32), (64, 16)), column=64, columns=64)
    share.check("x", record.record)
    pieces = {suffix: cut(suffix, tensor, share) for suffix, tensor in record.tensors.items()}
    whole = QuantLinear(record.record)
    part = QuantLinear(replace(record.record, out_features=48, in_features=64))
    for layer, tensors in ((whole, record.tensors), (part, pieces)):
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
