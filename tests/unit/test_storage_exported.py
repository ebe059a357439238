"""Dequantized copies in the cache: made once by each version of the code, private, and no more than the limit."""

import json
import os
import stat
import time
from pathlib import Path

import pytest

from qpalette.core.cache import CACHE_GB, code_digest
from qpalette.core.errors import CheckpointError, InputError
from qpalette.storage import exported, plain_directory

PAYLOAD = 1000  # bytes beside config and weights


class FakeGguf:
    """Stands in for a GGUF checkpoint: what the cache asks of one."""

    format, total_bytes, config, tensors = "gguf", 0, {"model_type": "llama"}, {}

    def __init__(self, fingerprint: str = "f00d") -> None:
        self.fingerprint = fingerprint

    def save_side_files(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text(" " * PAYLOAD)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "exported"


def used(directory: Path, seconds_ago: float) -> None:
    os.utime(directory, (time.time() - seconds_ago,) * 2)


def test_a_gguf_is_exported_once(cache):
    directory = plain_directory(FakeGguf())
    assert json.loads((directory / "config.json").read_text()) == FakeGguf.config
    before = os.stat(directory / "config.json").st_mtime_ns
    assert plain_directory(FakeGguf()) == directory
    assert os.stat(directory / "config.json").st_mtime_ns == before
    assert list(cache.iterdir()) == [directory], "no temporary is left"
    assert plain_directory(FakeGguf("cafe")) != directory


def test_nobody_else_may_read_it(cache):
    before = os.umask(0)
    try:
        plain_directory(FakeGguf())
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (cache, cache.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("package", ["qpalette", "gguf", "transformers"])
def test_another_release_exports_again(monkeypatch, package):
    directory = plain_directory(FakeGguf())
    original = exported.version
    monkeypatch.setattr(exported, "version", lambda name: "0.0.1" if name == package else original(name))
    assert plain_directory(FakeGguf()) != directory


def test_another_exporter_exports_again(tmp_path, monkeypatch):
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("a.py", "b.py"):
        (sources / name).write_text("x = 1")
    first = code_digest(sources.glob("*.py"))
    (sources / "b.py").write_text("x = 2")
    assert code_digest(sources.glob("*.py")) != first
    directory, asked = plain_directory(FakeGguf()), []
    monkeypatch.setattr(exported, "code_digest", lambda files: asked.extend(file.name for file in files) or "changed")
    assert plain_directory(FakeGguf()) != directory
    assert {"export.py", "safetensors_writer.py", "gguf_source.py", "gguf_metadata.py"} <= set(asked)


def test_what_was_not_used_for_longest_goes_first(cache, monkeypatch):
    a, b, c = (plain_directory(FakeGguf(name)) for name in "abc")
    used(a, 300), used(b, 200), used(c, 100)
    assert plain_directory(FakeGguf("a")) == a
    monkeypatch.setenv(CACHE_GB, str(3.5 * PAYLOAD / 1e9))
    d = plain_directory(FakeGguf("d"))
    assert set(cache.iterdir()) <= {a, c, d}
    assert {a, d} <= set(cache.iterdir())
    monkeypatch.setenv(CACHE_GB, "0")
    assert plain_directory(FakeGguf("d")) == d
    assert list(cache.iterdir()) == [d], "what is asked for stays"


def test_what_a_killed_export_left_goes_after_a_day(cache):
    plain_directory(FakeGguf())
    old, young = cache / ".dead.1.tmp", cache / ".beef.2.tmp"
    for folder, age in ((old, 2 * 86400), (young, 60)):
        folder.mkdir()
        used(folder, age)
    plain_directory(FakeGguf())
    assert not old.exists()
    assert young.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QPALETTE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="QPALETTE_CACHE"):
        plain_directory(FakeGguf())


@pytest.mark.parametrize("limit", ["-1", "50GB", "nan"])
def test_a_limit_that_is_none(monkeypatch, limit):
    monkeypatch.setenv(CACHE_GB, limit)
    with pytest.raises(InputError, match=f"{CACHE_GB} is '{limit}'"):
        plain_directory(FakeGguf())
