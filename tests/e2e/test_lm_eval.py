"""lm-eval on a packed checkpoint: by its own command line, and through ours. No network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import save_model

from qpalette.cli import main
from qpalette.core.errors import InputError, UnsupportedError

TASKS = Path(__file__).parents[1] / "tasks"
pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def _nothing_to_compile(monkeypatch):
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")  # for processes of a few seconds, compiling costs most


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("evaluated")
    save_model(directory / "tiny")
    with pytest.raises(SystemExit) as exit_:
        main(["quantize", str(directory / "tiny"), str(directory / "packed"), "--spec", "nuq-4"])
    assert not exit_.value.code
    return directory / "tiny", directory / "packed"


@pytest.fixture
def ours(capsys):
    """Scores as `qpalette eval --tasks` prints them."""

    def call(*arguments: object) -> dict:
        with pytest.raises(SystemExit) as exit_:
            main(["eval", *map(str, arguments), "--json"])
        assert not exit_.value.code
        return json.loads(capsys.readouterr().out)

    return call


def accuracy_by_their_command(model: Path) -> float:
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "letters", "--include_path", "."]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    offline = {"QPALETTE_AUTOLOAD": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=TASKS, env=os.environ | offline, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return float(re.search(r"\|letters\|.*?\|acc *\|[^|]*\| *([0-9.]+)\|", result.stdout)[1])


def test_their_command_before_and_after_quantization(models, ours):
    plain, packed = models
    found = ours(packed, "--reference", plain, "--tasks", TASKS / "letters.yaml")
    for model, key in ((plain, "reference"), (packed, "scores")):
        (score,) = found[key]
        assert (score["task"], score["metric"]) == ("letters", "acc")
        assert accuracy_by_their_command(model) == pytest.approx(score["value"], abs=5e-5)  # it prints four digits


def test_a_file_finds_its_data_from_anywhere(models, ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (score,) = ours(models[1], "--tasks", TASKS / "letters.yaml")["scores"]
    assert score["stderr"] > 0


def test_mistakes_are_named(tmp_path, monkeypatch):
    from qpalette.integrations import lm_eval

    wrong = tmp_path / "wrong.yaml"
    with pytest.raises(InputError, match=r"wrong\.yaml cannot be read"):
        lm_eval.read_tasks(str(wrong))
    wrong.write_text("task: x\nprocess_docs: !function utils.run\n")  # the tag by which lm-eval runs code
    with pytest.raises(InputError, match="!function"):
        lm_eval.read_tasks(str(wrong))
    wrong.write_text("- a list\n")
    with pytest.raises(InputError, match="field `task`"):
        lm_eval.read_tasks(str(wrong))
    with pytest.raises(InputError, match="names no task"):
        lm_eval.read_tasks(" , ")
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"qpalette\[eval\]"):
        lm_eval.read_tasks("letters")


def test_an_unknown_task_is_one_clear_line(models, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", str(models[1]), "--tasks", "no_such_task"])
    assert exit_.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: lm-eval cannot run these tasks")
    assert "no_such_task" in error
