"""What results say of where they are from, and that they are there after every row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import report
import tiles


def test_a_copy_without_its_history_names_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QPALETTE_COMMIT", raising=False)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.commit() == "unknown"
    monkeypatch.setenv("QPALETTE_COMMIT", "told")
    assert report.commit() == "told"


def test_a_run_that_is_cut_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(*problem: object, **more: object) -> float:
        if problem[1] == 14336:
            raise KeyboardInterrupt
        return 1e-5

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(tiles, "plain_seconds", seconds)
    monkeypatch.setattr(tiles, "launch_seconds", seconds)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a device")
    monkeypatch.setattr(sys, "argv", ["tiles.py", "--quick"])
    with pytest.raises(KeyboardInterrupt):
        tiles.main()
    kept = json.loads((tmp_path / "tiles.json").read_text())
    assert [(row["shape"], row["tokens"]) for row in kept["rows"]] == [("4096x4096", 32), ("2x14336x4096", 32)]
