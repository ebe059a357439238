"""The demo's steps, on a tiny model: each is a command that works, and what it says is there is there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from test_cli import _plain_output, model, run, save_model, text  # noqa: F401
from test_recipe import SHORT

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(run, tmp_path, monkeypatch):  # noqa: F811
    """The module, its commands run here and kept; its results are the test's."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands = []

    def qpalette(*arguments):
        done = run(*arguments)
        assert done.code == 0, done.err
        module.commands.append((arguments[0], done.out))

    monkeypatch.setattr(module, "qpalette", qpalette)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qpalette.recipe.options.STANDARD", {"cpu": SHORT, "cuda": SHORT})
    return module


@pytest.mark.parametrize("fast", [True, False])
def test_every_step_works_and_leaves_what_it_promises(demo, model, text, tmp_path, capsys, fast):  # noqa: F811
    pytest.importorskip("matplotlib")
    rows = [
        {"model": "x/original.gguf", "format": "gguf", "file_bytes": 98_000_000, "kl": None},
        {"model": "x/theirs.gguf", "format": "gguf", "file_bytes": 55_500_000, "kl": 0.4321},
        {"model": "x/ours", "format": "qpalette", "file_bytes": 50_000_000, "kl": 0.1234},
    ]
    (tmp_path / "compare_small.json").write_text(json.dumps({"text": "a/wiki.txt", "models": rows}))
    demo.main(model, bits=4, fast=fast, tokens=128, effort="fast", out=tmp_path / "out", text=text, windows=1)
    quantized = ["quantize"] if fast else ["quantize", "quantize"]
    assert [name for name, _ in demo.commands] == [*quantized, "compare", "generate", "generate"]
    shown = "".join(out for _, out in demo.commands) + capsys.readouterr().out
    assert "theirs.gguf" in shown
    assert "55.5" in shown
    assert "0.4321" in shown
    assert "0.1234" not in shown
    made = {entry.name for entry in (tmp_path / "out").iterdir()}
    pages = {"tiny-4bit", "tiny-4bit.html"}
    assert made == {"tiny-4bit-one-code", "tiny-4bit.png"} | (set() if fast else pages)
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (tmp_path / "out").iterdir()
        if folder.is_dir()
    ]
    assert max(sizes) < 1.15 * min(sizes), "what is compared has about one size"
