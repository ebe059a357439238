"""Safetensors in and out: nothing is dropped, only what is asked is read, every damage has its own message."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qpalette.core.errors import CheckpointError
from qpalette.storage import StreamingSafetensorsWriter, TensorInfo, export_checkpoint, held_bytes, open_checkpoint

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}


def tensors_of_a_model() -> dict[str, torch.Tensor]:
    """Tied embeddings (no lm_head), a bias, a scalar, an empty tensor, and a head no model class knows."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(48, 16, generator=generator).half(),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(16, 16, generator=generator).bfloat16(),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(16, generator=generator),
        "mtp.layers.0.foo.weight": torch.randn(16, 32, generator=generator).half(),
        "odd.bytes": torch.arange(3, dtype=torch.uint8),
        "a.flag": torch.tensor([True, False, True]),
        "a.scalar": torch.tensor(7, dtype=torch.int64),
        "nothing": torch.empty(0, 4),
    }


def write_model(directory: Path, shards: dict[str, list[str]] | None = None, index: bool = True) -> Path:
    """A model directory; `shards` maps file names to tensor names, None is one model.safetensors."""
    directory.mkdir(exist_ok=True)
    tensors = tensors_of_a_model()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    for file, names in (shards or {"model.safetensors": list(tensors)}).items():
        save_file({name: tensors[name] for name in names}, directory / file)
    if shards and index:
        weight_map = {name: file for file, names in shards.items() for name in names}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def two_shards() -> dict[str, list[str]]:
    names = list(tensors_of_a_model())
    return {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}


def assert_same(checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype == checkpoint.tensors[name].dtype
        assert read.shape == tensor.shape == checkpoint.tensors[name].shape
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("shards", [None, two_shards()], ids=["single", "sharded"])
@pytest.mark.parametrize("index", [True, False])
def test_every_tensor_is_read_and_survives_an_export(tmp_path, shards, index):
    checkpoint = open_checkpoint(write_model(tmp_path / "in", shards, index))
    assert_same(checkpoint, tensors_of_a_model())
    assert checkpoint.total_bytes == sum(t.nbytes for t in tensors_of_a_model().values())
    for max_shard_bytes in (10**9, 600):
        out = tmp_path / f"out-{max_shard_bytes}"
        export_checkpoint(checkpoint, out, max_shard_bytes)
        exported = open_checkpoint(out)
        assert_same(exported, tensors_of_a_model())
        assert exported.config == CONFIG
        assert (len(exported.files) == 1) == (max_shard_bytes == 10**9)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out-600", f"out-{10**9}"}


def test_tensors_that_the_index_forgot_are_carried(tmp_path):
    directory = write_model(tmp_path, two_shards())
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["mtp.layers.0.foo.weight"]
    index.write_text(json.dumps(content))
    assert_same(open_checkpoint(directory), tensors_of_a_model())


def test_reading_one_tensor_of_a_huge_file_reads_that_tensor_only(tmp_path):
    """A sparse file of 64 GiB: anything that read it whole would not come back."""
    (tmp_path / "config.json").write_text("{}")
    half = 2**35
    entries = {
        "big": {"dtype": "U8", "shape": [half], "data_offsets": [0, half]},
        "small": {"dtype": "U8", "shape": [4], "data_offsets": [half, half + 4]},
        "big2": {"dtype": "U8", "shape": [half], "data_offsets": [half + 4, 2 * half + 4]},
    }
    header = json.dumps(entries).encode()
    with open(tmp_path / "model.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.seek(8 + len(header) + half)
        stream.write(b"\x01\x02\x03\x04")
        stream.truncate(8 + len(header) + 2 * half + 4)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.total_bytes == 2 * half + 4
    assert checkpoint.read("small").tolist() == [1, 2, 3, 4]
    assert len(checkpoint.fingerprint) == 64


def test_a_read_tensor_owns_its_memory(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path))
    first = checkpoint.read("model.embed_tokens.weight")
    first.zero_()
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), tensors_of_a_model()["model.embed_tokens.weight"])
    with pytest.raises(CheckpointError, match=r"there is no tensor 'lm_head.weight'"):
        checkpoint.read("lm_head.weight")


def test_fingerprint_survives_a_copy_and_sees_a_change(tmp_path):
    original = open_checkpoint(write_model(tmp_path / "a", two_shards())).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert open_checkpoint(tmp_path / "b").fingerprint == original
    shard = tmp_path / "b" / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert open_checkpoint(tmp_path / "b").fingerprint != original


def test_side_files_are_text_of_the_tokenizer_only(tmp_path):
    directory = write_model(tmp_path / "in")
    kept = {
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.model",
        "tokenizer.model.v3",
        "source.spm",
        "additional_chat_templates/tool_use.jinja",
        "tokenizer/vocab.txt",
        "LICENSE",
    }
    dropped = {"modeling_evil.py", "pytorch_model.bin", "x.gguf", "consolidated.safetensors", "old.index.json", "a.pkl"}
    dropped |= {
        "checkpoint-5/trainer_state.json",
        "tokenizer/tokenizer.py",
        "tokenizer/more/vocab.txt",
        ".cache/a.json",
    }
    for name in kept | dropped:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "evil"}, "pad": "é"}))
    (tmp_path / "out").mkdir()
    open_checkpoint(directory).save_side_files(tmp_path / "out")
    found = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found == kept | {"tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8")) == {"pad": "é"}


def test_remote_code_is_dropped_from_the_config_with_a_word(tmp_path, caplog):
    directory = write_model(tmp_path)
    (directory / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "evil.Model"}}))
    assert open_checkpoint(directory).config == CONFIG
    assert "remote code is never run" in caplog.text


def test_an_export_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_model(tmp_path / "in"))
    read, alive = checkpoint.read, weakref.WeakSet()

    def tracked(name: str) -> torch.Tensor:
        assert not alive, "the tensor before this one is still held"
        tensor = read(name)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(checkpoint, "read", tracked)
    export_checkpoint(checkpoint, tmp_path / "out")
    monkeypatch.undo()
    assert_same(open_checkpoint(tmp_path / "out"), tensors_of_a_model())


def test_an_export_of_several_files_holds_no_more_than_it_says(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_model(tmp_path / "in"))
    shard = max(info.nbytes for info in checkpoint.tensors.values())
    most = held_bytes(checkpoint, 3, shard)
    read, alive, held = checkpoint.read, weakref.WeakSet(), []

    def tracked(name: str) -> torch.Tensor:
        tensor = read(name)
        alive.add(tensor)
        held.append(sum(tensor.nbytes for tensor in alive))
        return tensor

    monkeypatch.setattr(checkpoint, "read", tracked)
    export_checkpoint(checkpoint, tmp_path / "out", shard, threads=3)
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert 0 < max(held) <= most <= checkpoint.total_bytes
    assert_same(open_checkpoint(tmp_path / "out"), tensors_of_a_model())


def test_a_failed_export_leaves_nothing(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "in"))
    (tmp_path / "in" / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match="the file changed since it was opened"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_export_never_overwrites(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "in"))
    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(checkpoint, tmp_path / "in")


# --- damaged and hostile inputs -------------------------------------------------------------------------------------


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HOSTILE = {
    "empty": (b"", "goes beyond the file"),
    "short": (b"\x01\x00", "goes beyond the file"),
    "length beyond the file": (raw_file(entry(), b"1234", 10**6), "goes beyond the file"),
    "length of 2^63": (raw_file(entry(), b"1234", 2**63), "goes beyond the file"),
    "no JSON": (raw_file(b"{nope}"), "no valid JSON"),
    "deep JSON": (raw_file(b"[" * 100_000), "no valid JSON"),
    "no UTF-8": (raw_file(b'{"\xff": 1}'), "no valid JSON"),
    "a list": (raw_file(b"[]"), "no JSON object"),
    "twice": (raw_file(entry()[:-1] + b"," + entry()[1:], b"1234"), "a name occurs twice"),
    "no fields": (raw_file(b'{"x": {}}'), "entry of tensor 'x' is malformed"),
    "no dict": (raw_file(b'{"x": 3}'), "entry of tensor 'x' is malformed"),
    "negative": (raw_file(entry(shape=(-4,)), b"1234"), "no natural number"),
    "float shape": (raw_file(entry(shape=(4.0,)), b"1234"), "no natural number"),
    "unknown dtype": (raw_file(entry(dtype="F4"), b"1234"), "dtype 'F4', which is not supported"),
    "overlap or gap": (raw_file(entry(offsets=(1, 5)), b"12345"), "claims bytes 1 to 5, but 0 to 4"),
    "wrong size": (raw_file(entry(shape=(2**62,)), b"1234"), "claims bytes 0 to 4"),
    "truncated": (raw_file(entry(), b"123"), "is truncated: its header announces"),
    "trailing": (raw_file(entry(), b"12345"), "belong to no tensor"),
    "nothing in it": (raw_file(b"{}"), "no tensor in"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_have_one_clear_error_naming_the_file(tmp_path, content, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_links_that_leave_the_model_are_not_followed(tmp_path, caplog):
    """Neither by side files nor by the config, whose content goes into the result; weights may lie anywhere."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "secret").write_text("secret")
    (private / "config.json").write_text(json.dumps({"auths": "secret"}))
    directory = write_model(tmp_path / "model")
    (directory / "notes.txt").symlink_to(private / "secret")
    (directory / "more.txt").symlink_to("notes.txt")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").symlink_to("tokenizer.json")
    (directory / "model.safetensors").rename(private / "model.safetensors")
    (directory / "model.safetensors").symlink_to(private / "model.safetensors")
    (tmp_path / "link").symlink_to(directory, target_is_directory=True)
    for opened in (directory, tmp_path / "link"):
        out, checkpoint = tmp_path / f"out-{opened.name}", open_checkpoint(opened)
        assert_same(checkpoint, tensors_of_a_model())
        out.mkdir()
        caplog.clear()
        checkpoint.save_side_files(out)
        assert sorted(file.name for file in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
        for name in ("notes.txt", "more.txt"):
            assert f"{name} is a link to {private / 'secret'}, outside the model: it is left out" in caplog.text
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to(private / "config.json")
    with pytest.raises(
        CheckpointError, match=r"config\.json is a link to .*, outside the model: copy it there, or give"
    ):
        open_checkpoint(directory)


def test_the_links_of_the_hub_cache_are_followed(tmp_path, caplog):
    """snapshots/REVISION/FILE -> ../../blobs/HASH, for every file; a link to anywhere else is not."""
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "f00d", repository / "blobs"
    blobs.mkdir(parents=True)
    plain = write_model(tmp_path / "plain")
    (plain / "tokenizer.json").write_text("{}")
    snapshot.mkdir(parents=True)
    for number, file in enumerate(plain.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    for name, elsewhere in (("a.txt", tmp_path / "secret"), ("b.txt", repository / "secret")):
        elsewhere.write_text("secret")
        (snapshot / name).symlink_to(elsewhere)
    checkpoint = open_checkpoint(snapshot)
    assert_same(checkpoint, tensors_of_a_model())
    assert checkpoint.fingerprint == open_checkpoint(plain).fingerprint
    (tmp_path / "out").mkdir()
    checkpoint.save_side_files(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
    assert "a.txt is a link" in caplog.text
    assert "b.txt is a link" in caplog.text


def edit_index(directory: Path, **weight_map: str) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].update(weight_map)
    index.write_text(json.dumps(content))


def test_index_naming_a_missing_shard(tmp_path):
    directory = write_model(tmp_path, two_shards())
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard model-00002-of-00002.safetensors, which is missing"):
        open_checkpoint(directory)


def test_index_naming_a_tensor_that_the_shard_lacks(tmp_path):
    directory = write_model(tmp_path, two_shards())
    edit_index(directory, ghost="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'ghost' is in model-00001-of-00002.safetensors, but it is not"):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "pytorch_model.bin"])
def test_index_pointing_elsewhere(tmp_path, name):
    directory = write_model(tmp_path, two_shards())
    edit_index(directory, ghost=name)
    with pytest.raises(CheckpointError, match="no safetensors file beside it"):
        open_checkpoint(directory)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"x": 1}}'])
def test_index_that_is_none(tmp_path, content):
    directory = write_model(tmp_path, two_shards())
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(directory)


@pytest.mark.parametrize("index", [True, False])
def test_a_tensor_in_two_shards(tmp_path, index):
    shards = two_shards()
    shards["model-00002-of-00002.safetensors"].append("model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' is in two files.*00001.*00002"):
        open_checkpoint(write_model(tmp_path, shards, index))


def test_second_copies_beside_the_model_are_left_out_with_a_word(tmp_path, caplog):
    directory = write_model(tmp_path)
    save_file({"tok_embeddings.weight": torch.zeros(2)}, directory / "consolidated.safetensors")
    assert_same(open_checkpoint(directory), tensors_of_a_model())
    assert "consolidated.safetensors is not part of the model" in caplog.text


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("beside", ["all shards", "no shard"])
def test_a_whole_file_is_read_as_transformers_does_whatever_lies_beside_it(tmp_path, caplog, index, beside):
    """Shards or an index of another release of the model: the single file goes first."""
    directory = write_model(tmp_path, two_shards(), index)
    for shard in two_shards():
        old = {name: torch.zeros_like(tensor) for name, tensor in load_file(directory / shard).items()}
        save_file(old | {"of.old": torch.zeros(1)}, directory / shard)
        if beside == "no shard":
            (directory / shard).unlink()
    assert_same(open_checkpoint(write_model(directory)), tensors_of_a_model())
    for shard in two_shards() if beside == "all shards" else ():
        assert f"{shard} is not part of the model" in caplog.text
    assert ("transformers reads this file, not" in caplog.text) == index


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=r"no pickle is ever loaded; convert it to safetensors"):
            open_checkpoint(path)


def test_quantized_sources_are_refused(tmp_path):
    directory = write_model(tmp_path)
    (directory / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(CheckpointError, match=r"quantized already \(method 'quip'\)"):
        open_checkpoint(directory)


def test_paths_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither safetensors files nor a .gguf file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    write_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"give the directory that holds config.json"):
        open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        open_checkpoint(tmp_path)


def test_the_hub_is_asked_for_no_code_and_its_refusal_is_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(hub_id, **patterns):
        asked.update(patterns)
        if hub_id == "owner/name":
            return str(write_model(tmp_path))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same(open_checkpoint("owner/name"), tensors_of_a_model())
    files = ["model.safetensors", "modeling.py", "pytorch_model.bin", "tokenizer.json", "original/model.safetensors"]
    files += ["tokenizer.model.v3", "additional_chat_templates/tool_use.jinja"]
    chosen = list(huggingface_hub.utils.filter_repo_objects(files, **asked))
    assert chosen == ["model.safetensors", "tokenizer.json", *files[-2:]]
    with pytest.raises(CheckpointError, match=r"the Hub did not give it \(no network\)"):
        open_checkpoint("owner/absent")


# --- the streaming writer -------------------------------------------------------------------------------------------


def infos_of(tensors: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def test_what_is_streamed_is_read_by_safetensors_itself(tmp_path):
    tensors = tensors_of_a_model() | {"strided": torch.arange(12.0).reshape(3, 4).T}
    path = tmp_path / "model.safetensors"
    with StreamingSafetensorsWriter(path, infos_of(tensors), {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        assert not path.exists()
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.zeros(3), "declared torch.float32"),
        ("a", torch.zeros(2).half(), "declared torch.float32"),
        ("b", torch.zeros(2), "was not declared, or is written twice"),
        (None, None, "declared but never written: a"),
    ],
)
def test_writing_something_else_than_declared(tmp_path, name, tensor, message):
    def write() -> None:
        with StreamingSafetensorsWriter(tmp_path / "x.safetensors", [TensorInfo("a", (2,), torch.float32)]) as writer:
            if name is not None:
                writer.write(name, tensor)

    with pytest.raises(ValueError, match=message):
        write()
    assert not list(tmp_path.iterdir())


def test_declaring_what_cannot_be_written(tmp_path):
    info = TensorInfo("a", (2,), torch.float32)
    with pytest.raises(ValueError, match="declared twice"):
        StreamingSafetensorsWriter(tmp_path / "x", [info, info])
    with pytest.raises(ValueError, match=r"no name for torch.complex128"):
        StreamingSafetensorsWriter(tmp_path / "x", [TensorInfo("a", (2,), torch.complex128)])
