"""Quantizing while transformers loads: what it gives is what `quantize` gives, and it is done once."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from test_cli import save_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import qpalette
from qpalette.core.errors import CheckpointError, InputError, SpecError
from qpalette.core.files import locked
from qpalette.formats import open_artifact
from qpalette.integrations.transformers import QPaletteConfig
from qpalette.nn import QuantEmbedding, QuantLinear
from qpalette.pipeline import cached, work
from qpalette.storage import open_checkpoint

IDS = torch.arange(2, 30)[None]
SPEC = "nuq-4"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "model"
    save_model(directory)
    return directory


@pytest.fixture
def source(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Names of the linears that were encoded so far."""
    names, encode = [], work.encode_linear

    def noted(name: str, *arguments):
        names.append(name)
        return encode(name, *arguments)

    monkeypatch.setattr(work, "encode_linear", noted)
    return names


def load(model: Path, kind: type = AutoModelForCausalLM, **options):
    return kind.from_pretrained(model, quantization_config=qpalette.Config(**({"spec": SPEC} | options)))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_it_is_the_model_that_quantize_writes(source, tmp_path):
    before = torch.get_default_dtype()
    model = load(source, also=["embed_tokens"])
    assert torch.get_default_dtype() == before
    qpalette.quantize(source, tmp_path / "out", spec=SPEC, also=["embed_tokens"])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantLinear)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert isinstance(model.config.quantization_config, QPaletteConfig)
    assert model.dtype == expected.dtype == torch.float16
    assert torch.equal(logits(model), logits(expected))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("also", [[], ["embed_tokens"]])
def test_a_head_that_is_tied(tmp_path, also):
    """Transformers ties nothing while it builds a model, and what is quantized meanwhile is to be complete."""
    save_model(tmp_path / "tied", tied=True)
    tie_weights = PreTrainedModel.tie_weights
    model = load(tmp_path / "tied", also=also)
    qpalette.quantize(tmp_path / "tied", tmp_path / "out", spec=SPEC, also=also)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    assert PreTrainedModel.tie_weights is tie_weights
    assert PreTrainedModel.tie_weights.__name__ == "tie_weights"


def test_whoever_switched_bars_off_gets_the_same_model(source, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    qpalette.quantize(source, tmp_path / "out", spec=SPEC)
    assert torch.equal(logits(load(source)), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


def test_what_was_quantized_on_load_is_saved_and_copied_like_any_other(source, tmp_path):
    model = load(source)
    model.save_pretrained(tmp_path / "saved")
    open_artifact(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert isinstance(model.dequantize().model.layers[0].mlp.up_proj, torch.nn.Linear)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_of_shards_and_by_any_class(source, tmp_path, kind):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    sharded, whole = load(tmp_path / "shards", kind), load(source, kind)
    with torch.inference_mode():
        assert torch.equal(sharded(IDS)[0], whole(IDS)[0])


def test_bits_are_a_budget_and_load_takes_them_too(source):
    model, tokenizer = qpalette.load(source, bits=4.5, effort="fast")
    assert tokenizer is not None
    same = load(source, spec=None, bits="4.50", effort="fast")
    assert torch.equal(logits(model), logits(same))
    linears = model.config.quantization_config.linears.values()
    assert {entry["spec"] for entry in linears} == {
        entry["spec"] for entry in same.config.quantization_config.linears.values()
    }


def test_the_second_load_encodes_nothing_wherever_the_model_lies(source, tmp_path, encoded, cache):
    first = logits(load(source))
    assert encoded
    encoded.clear()
    for file in source.iterdir():
        file.touch()
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    for model in (source, moved):
        assert torch.equal(logits(load(model)), first)
    assert not encoded
    assert len(list(cache.iterdir())) == 1


def test_its_own_file_is_read_once(source, monkeypatch):
    load(source)
    read = []
    monkeypatch.setattr("qpalette.storage.content.hashlib.file_digest", lambda stream, kind: read.append(stream.name))
    load(source)
    assert not read


def a_bit(directory: Path) -> None:
    """In the middle of the weights, where no sample looks, with the times of before."""
    file = directory / "model.safetensors"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def a_number(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("change", [a_bit, a_number])
def test_another_content_is_another_model(source, cache, change):
    load(source)
    change(source)
    load(source)
    assert len(list(cache.iterdir())) == 2


def test_what_lies_beside_the_weights_is_the_source_s_own_each_time(source, cache):
    """A tokenizer that the Hub's cache has only since somebody asked for it, another template, other ends of text."""
    hidden = {file.name: file.read_bytes() for file in source.glob("tokenizer*")}
    for name in hidden:
        (source / name).unlink()
    assert qpalette.load(source, bits=4.5, effort="fast")[1] is None
    for name, content in hidden.items():
        (source / name).write_bytes(content)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    model, tokenizer = qpalette.load(source, bits=4.5, effort="fast")
    assert tokenizer.chat_template == "{{ messages }}"
    assert model.generation_config.eos_token_id == 7
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "options", [{"spec": "nuq-3"}, {"seed": 1}, {"rotation": "block-16"}, {"exclude": ["*.up_proj"]}]
)
def test_other_options_are_another_model(source, cache, options):
    load(source)
    model = load(source, **options)
    assert len(list(cache.iterdir())) == 2
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear) == ("exclude" not in options)


def test_other_code_quantizes_again(source, cache, monkeypatch):
    load(source)
    monkeypatch.setattr(cached, "code_digest", lambda files: "changed" if list(files) else "")
    load(source)
    assert len(list(cache.iterdir())) == 2


def test_a_run_that_was_stopped_goes_on(source, encoded, monkeypatch):
    checkpoint = open_checkpoint(source)

    def cut(done: int, total: int, linear: str, distortion: float) -> None:
        if len(encoded) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached.quantized_copy(checkpoint, spec=SPEC, progress=cut)
    directory = cached.quantized_copy(checkpoint, spec=SPEC)
    assert sorted(encoded) == sorted(open_artifact(directory).records), "each once"
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]


def test_of_two_at_once_one_works_and_the_other_waits(source, tmp_path, encoded, cache, monkeypatch):
    checkpoint = open_checkpoint(source)
    directory = cached.quantized_copy(checkpoint, spec=SPEC)
    aside = directory.rename(tmp_path / "aside")
    encoded.clear()
    found: list[Path] = []
    with locked(directory.with_name(f"{directory.name}.partial"), directory):  # as the one that works does
        other = threading.Thread(target=lambda: found.append(cached.quantized_copy(checkpoint, spec=SPEC)))
        other.start()
        time.sleep(0.5)  # it is told by the lock, and waits for it
        assert other.is_alive()
        aside.rename(directory)
    other.join(timeout=60)
    assert found == [directory]
    assert not encoded


def test_a_damaged_copy_is_made_again(source, cache, caplog):
    expected = logits(load(source))
    (copy_,) = cache.iterdir()
    (copy_ / "model.safetensors").write_bytes(b"")
    assert torch.equal(logits(load(source)), expected)
    assert "it is made again" in caplog.text


def test_a_model_that_is_quantized_already(source, tmp_path):
    qpalette.quantize(source, tmp_path / "out", spec=SPEC)
    with pytest.raises(ValueError, match="quantized with QPaletteConfig"):
        load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="quantized already"):
        qpalette.load(tmp_path / "out", bits=3)


def test_what_cannot_be_quantized_on_load_is_told_before_the_work(source, tmp_path, encoded):
    config = qpalette.Config(spec=SPEC)
    shutil.copyfile(source / "model.safetensors", source / "model.fp16.safetensors")
    with pytest.raises(
        CheckpointError, match=r"would load model\.fp16\.safetensors and qpalette reads model\.safetensors"
    ):
        AutoModelForCausalLM.from_pretrained(source, variant="fp16", quantization_config=config)
    with pytest.raises(CheckpointError, match="no linear of the checkpoint has such a name"):
        load(source, exclude=["no.such.linear"])
    assert not encoded


@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 4, "spec": SPEC}, {"bits": "four"}, {"bits": float("nan")}, {"spec": "nuq-77"}, {"size": "much"}],
)
def test_options_that_mean_nothing(options):
    with pytest.raises(SpecError):
        qpalette.Config(**options)


def test_a_place_on_the_disk_is_refused(source):
    with pytest.raises(InputError, match="disk"):
        AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=qpalette.Config(spec=SPEC),
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=source,
        )
