"""A tokenizer that knows more than the model, one that is not there, and what a generation_config.json may ask for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import VOCABULARY, save_model
from transformers import AutoTokenizer

import qpalette
from qpalette.cli import main
from qpalette.core.errors import InputError

COMMANDS = {
    "eval": ("{packed}", "--text", "{text}"),
    "calibrate": ("{model}", "{out}", "--text", "{text}", "--tokens", "64"),
    "sensitivity": ("{model}", "{out}.json", "--text", "{text}", "--tokens", "64"),
    "tune": ("{packed}", "--reference", "{model}", "--text", "{text}", "--window", "32", "--held-out", "1"),
    "generate": ("{packed}", "the lazy dog"),
    "chat": ("{packed}",),
}


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line in this process: code, stdout and stderr."""
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=exit_.value.code or 0, out=captured.out, err=captured.err)

    return call


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A model and its quantized directory."""
    directory = tmp_path_factory.mktemp("models")
    save_model(directory / "model")
    qpalette.quantize(directory / "model", directory / "packed", spec="nuq-4")
    return {"model": directory / "model", "packed": directory / "packed"}


@pytest.fixture
def pair(originals, tmp_path) -> dict[str, Path]:
    """Copies, whose tokenizers may be changed."""
    return {kind: Path(shutil.copytree(original, tmp_path / kind)) for kind, original in originals.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 30)
    return file


def arguments(command: str, pair: dict[str, Path], text: Path, tmp_path: Path) -> list[str]:
    return [part.format(**pair, text=text, out=tmp_path / "out") for part in COMMANDS[command]]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "chat"])
def test_a_token_beyond_the_embedding_is_one_line(run, pair, text, tmp_path, command):
    """Not an index that is out of range somewhere in the work."""
    for directory in pair.values():
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_tokens([*(f"<extra {i}>" for i in range(VOCABULARY)), "lazy"])
        tokenizer.save_pretrained(directory)
    result = run(command, *arguments(command, pair, text, tmp_path))
    assert result.code == 1
    token = tokenizer.convert_tokens_to_ids("lazy")
    assert f"the text has token {token} ('lazy'), but the model knows {VOCABULARY}" in result.err
    assert result.err.count("error:") == 1


def test_a_template_of_tokens_beyond_the_embedding(pair, run, tmp_path):
    """Text that the model writes itself stands between them."""
    tokenizer = AutoTokenizer.from_pretrained(pair["model"])
    tokenizer.add_tokens([f"<extra {i}>" for i in range(VOCABULARY)])
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}<turn>"
    tokenizer.save_pretrained(pair["model"])
    result = run("calibrate", pair["model"], tmp_path / "out", "--tokens", "64")
    assert "('<turn>'), but the model knows " in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_tokenizer_what_needs_one_says_so_before_the_work(
    run,
    pair,
    text,
    tmp_path,
    command,
    monkeypatch,
):
    for directory in pair.values():
        remove_tokenizer(directory)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # not so far
    result = run(command, *arguments(command, pair, text, tmp_path))
    assert result.code == 1
    assert "has no tokenizer, and text needs one: copy its tokenizer.json" in result.err


def test_without_a_tokenizer_the_rest_works(pair, text, tmp_path):
    for directory in pair.values():
        remove_tokenizer(directory)
    _, tokenizer = qpalette.load(pair["packed"])
    assert tokenizer is None
    assert qpalette.calibrate(pair["model"], tmp_path / "hessians", tokens=64, window=32).tokens
    written = tmp_path / "hessians" / "text.tokens.json"
    assert qpalette.evaluate(pair["packed"], pair["model"], written).kl > 0
    with pytest.raises(InputError, match="has no tokenizer"):
        qpalette.evaluate(pair["packed"], pair["model"], text)


def remove_tokenizer(directory: Path) -> None:
    for file in [*directory.glob("tokenizer*"), *directory.glob("chat_template*")]:
        file.unlink()


ASKED = {
    "beams": {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "several": {"num_return_sequences": 2, "do_sample": True},
    "several beams": {"num_return_sequences": 2, "num_beams": 2},
    "greedy, with a temperature": {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    "a static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "guesses from the prompt": {"prompt_lookup_num_tokens": 3},
    "contrast": {"penalty_alpha": 0.6, "top_k": 4},
    "layers": {"dola_layers": "high"},
    "a length": {"max_length": 5},
    "a time": {"max_time": 0.0},
    "chunks": {"prefill_chunk_size": 2},
}


@pytest.fixture(scope="module")
def answered(originals):
    """What the model says as it is."""
    from qpalette.cli.answer import open_model, prompt_of, stream_answer

    loaded, tokenizer = open_model(str(originals["packed"]), "transformers", "cpu", None, "never")
    prompt = prompt_of(tokenizer, [{"role": "user", "content": "the quick"}])
    return stream_answer(loaded, tokenizer, prompt, 8, 0.0, lambda word: None).text


@pytest.mark.parametrize("fields", ASKED.values(), ids=ASKED.keys())
def test_however_a_model_is_to_be_searched_one_answer_is_streamed(run, originals, tmp_path, answered, fields):
    asking(originals["packed"], tmp_path / "asking", fields)
    result = run("generate", tmp_path / "asking", "the quick", "--max-new-tokens", "8")
    assert (result.code, result.out) == (0, answered + "\n"), result.err


def test_what_is_asked_of_the_answer_itself_holds(run, originals, tmp_path, answered):
    packed = originals["packed"]
    first = answered.strip()[0]
    asking(packed, tmp_path / "stops", {"stop_strings": [first]})
    stopped = run("generate", tmp_path / "stops", "the quick", "--max-new-tokens", "8")
    assert stopped.out.strip() == first != answered.strip()
    tokens = AutoTokenizer.from_pretrained(packed).convert_tokens_to_ids([first])
    asking(packed, tmp_path / "bans", {"suppress_tokens": tokens})
    assert first not in run("generate", tmp_path / "bans", "the quick", "--max-new-tokens", "8").out


def asking(packed: Path, target: Path, fields: dict) -> None:
    shutil.copytree(packed, target)
    file = target / "generation_config.json"
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | fields))
