"""One loader for every face: a directory, a file or a name on the Hub, packed or not, and never the model's code."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from test_cli import _plain_output, run, save_model  # noqa: F401 - fixtures

import qpalette
from qpalette.backends.cpu.step import Program
from qpalette.core.errors import ArtifactError, CheckpointError, InputError, UnsupportedError
from qpalette.evaluate import bits_per_weight, load, load_model
from qpalette.evaluate.loading import is_artifact
from qpalette.storage import local_path

ROOT = Path(__file__).parents[2]
IDS = torch.arange(33, 45)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "plain")
    qpalette.quantize(folder / "plain", folder / "packed", spec="nuq-4")
    (folder / "packed" / "modeling_evil.py").write_text("raise AssertionError('code of a model ran')\n")
    (folder / "packed" / "pytorch_model.bin").write_bytes(b"a pickle")
    return {f"owner/{kind}": folder / kind for kind in ("plain", "packed")}


@pytest.fixture
def hub(models, tmp_path, monkeypatch) -> list[str]:
    """The Hub without a network: its cache's layout, links into a folder of blobs. Returns what was asked for."""
    asked = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(hub_id)
        if hub_id not in models:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository\nmore")
        names = [file.name for file in models[hub_id].iterdir()]
        home = tmp_path / ("models--" + hub_id.replace("/", "--"))
        snapshot = home / "snapshots" / "0123abcd"
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            content = (models[hub_id] / name).read_bytes()
            blob = home / "blobs" / hashlib.sha256(content).hexdigest()
            for folder in (blob.parent, snapshot):
                folder.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("entrance", [qpalette.load, load_model])
def test_a_name_on_the_hub_is_fetched_once_and_is_the_directory(models, hub, kind, entrance):
    name = f"owner/{kind}"
    model, tokenizer = entrance(name, dtype=torch.float32)
    assert hub == [name]
    here, _ = entrance(models[name], dtype=torch.float32)
    assert hub == [name]
    assert not model.training
    assert torch.equal(model(IDS).logits, here(IDS).logits)
    assert tokenizer("hi")["input_ids"] == [104, 105]


def test_what_the_hub_is_asked_for(models, hub):
    place = local_path("owner/packed")
    fetched, there = {file.name for file in place.iterdir()}, {file.name for file in models["owner/packed"].iterdir()}
    assert there - fetched == {"modeling_evil.py", "pytorch_model.bin"}
    assert is_artifact(place)
    with pytest.raises(CheckpointError, match=r"the Hub did not give it \(no such repository\)"):
        load("owner/absent")


COMMANDS = {
    "generate": ("hello", "--max-new-tokens", "2", "--json"),
    "eval": ("--reference", "owner/plain", "--text", "{text}", "--windows", "1", "--json"),
    "bench": ("--batch", "1", "--context", "4", "--steps", "1", "--dtype", "float32", "--runner", "eager", "--json"),
    "inspect": ("--json",),
}


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_open_a_name_on_the_hub(run, hub, tmp_path, models, command, kind):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("some words " * 60)
    options = [option.format(text=text) for option in COMMANDS[command]]
    result = run(command, f"owner/{kind}", *options)
    assert result.code == 0, result.err
    assert json.loads(result.out)
    if command == "eval":
        measured = json.loads(result.out)
        assert (measured["kl"] == 0) == (kind == "plain")
        assert measured["bits_per_weight"] == bits_per_weight(models[f"owner/{kind}"])


def test_what_was_fetched_is_verified(run, hub):  # noqa: F811
    result = run("inspect", "owner/packed", "--verify")
    assert result.code == 0, result.err
    assert "are as they were written" in result.err


def test_chat_and_serve_open_it_too(run, hub, monkeypatch):  # noqa: F811
    import io

    from qpalette.evaluate.loading import directory_for

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert run("chat", "owner/packed", "--max-new-tokens", "2").code == 0
    assert is_artifact(directory_for("owner/packed"))
    assert (directory_for("owner/plain") / "model.safetensors").exists()


def test_eval_takes_a_device(run, models, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("some words " * 60)
    result = run("eval", models["owner/packed"], "--text", text, "--device", "cuda:63")
    assert result.code != 0
    assert "there is no device cuda:63" in result.err
    assert run("eval", models["owner/packed"], "--text", text, "--device", "cpu", "--json").code == 0
    with pytest.raises(InputError, match="there is no device"):
        load(models["owner/plain"], device="cuda:63")


def test_the_type_and_the_backend_are_chosen(models, monkeypatch):
    monkeypatch.setenv("QPALETTE_BACKEND", "cpu")  # what `load` sets is undone after the test
    assert load(models["owner/plain"])[0].dtype == torch.float16, "the checkpoint's own"
    assert load(models["owner/packed"], dtype=torch.bfloat16, backend="ref")[0].dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="abacus"):
        load(models["owner/packed"], backend="abacus")


def with_code(directory: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a model whose config names code beside it."""
    config = json.loads((directory / "config.json").read_text())
    classes = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    config["auto_map"] = classes
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_evil.py").write_text("raise AssertionError('code of a model ran')\n")
    return directory


def test_code_of_a_model_is_not_run_nor_asked_for(tmp_path, monkeypatch):
    def ask(prompt: str = "") -> str:
        raise AssertionError(f"it asked: {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 1)
    for name in ("known", "unknown"):
        save_model(tmp_path / name)
    model, _ = load(with_code(tmp_path / "known", lambda config: None))
    assert type(model).__name__ == "LlamaForCausalLM"
    with pytest.raises((ArtifactError, CheckpointError), match="cannot load"):
        load(with_code(tmp_path / "unknown", lambda config: config.update(model_type="evil", architectures=["Model"])))


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_a_count_that_cannot_be_true_builds_nothing(tmp_path, key):
    """A million layers would take hours before a weight is missed."""
    save_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 1_000_000}))
    with pytest.raises(CheckpointError, match="1000000 layers or experts"):
        load(tmp_path)


def auto_calls(file: Path) -> list[ast.Call]:
    """Calls that may run a model's code unless they are told not to: `Auto...from_pretrained` and `.from_config`."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("from_pretrained", "from_config")
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id.startswith("Auto")
    ]


def test_every_call_of_an_auto_class_refuses_code():
    files = [file for folder in ("src", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")]
    calls = [(file, call) for file in files for call in auto_calls(file)]
    assert len(calls) > 10
    for file, call in calls:
        said = {keyword.arg: keyword.value for keyword in call.keywords}.get("trust_remote_code")
        assert isinstance(said, ast.Constant), f"{file}:{call.lineno} says nothing of trust_remote_code"
        assert said.value is False, f"{file}:{call.lineno}"


def test_fast_writes_the_same_and_its_mistakes_come_before_the_model(models):
    ids, options = torch.full((1, 9), 5), {"max_new_tokens": 24, "do_sample": False}
    wanted = qpalette.load(models["owner/packed"], dtype=torch.float32)[0].generate(ids, **options)
    model, _ = qpalette.load(models["owner/packed"], dtype=torch.float32, fast=True, compile="background")
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options), wanted)
        model.generate.wait()
    programs = [step.graph for session in model.generate.loop.sessions for step in session.steps.values()]
    assert any(isinstance(program, Program) for program in programs)
    with pytest.raises(InputError, match="choose never, background, now"):
        qpalette.load("no/such", fast=True, compile="soon")
