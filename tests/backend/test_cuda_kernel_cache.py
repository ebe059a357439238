"""Compiled CUDA kernels, on disk and loaded: what is damaged, foreign or of another compiler is compiled anew, and what
was loaded once stays."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("cuda.core", reason="needs qpalette[cuda]")

from qpalette.backends.cuda import compiler, cubins

SOURCE = 'extern "C" __global__ void nothing() {}'


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the compiled code of SOURCE lies, as a fresh process finds it."""
    monkeypatch.setenv("QPALETTE_COMPILE_CACHE", str(tmp_path / "cache"))
    compile_anew()
    (file,) = (tmp_path / "cache" / "cubins").iterdir()
    return file


def compile_anew() -> bytes:
    compiler.compile_cubin.cache_clear()
    return compiler.compile_cubin(SOURCE, "sm_90", ())


def no_compiler(*_: object, **__: object) -> bytes:
    raise AssertionError("compiled again")


def test_code_is_found_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile_anew()
    monkeypatch.setattr(compiler, "_compile", no_compiler)
    assert code.startswith(b"\x7fELF")
    assert compile_anew() == code


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        lambda content: bytes([content[0] ^ 128]) + content[1:],
        lambda content: b"\x7fELF and what another program wrote",
    ],
    ids=["empty", "no code", "cut", "longer", "a bit of the code", "a bit of the digest", "foreign"],
)
def test_a_damaged_file_is_compiled_and_written_again(kept: Path, damage) -> None:
    code, content = compile_anew(), kept.read_bytes()
    kept.write_bytes(damage(content))
    assert compile_anew() == code
    assert kept.read_bytes() == content


def test_another_compiler_does_not_find_the_code_of_this_one(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core, major, minor = compiler.compiler_version()
    for version in ((core, major, minor + 1), (core + ".1", major, minor)):
        monkeypatch.setattr(compiler, "compiler_version", lambda version=version: version)
        compile_anew()
    assert len(list(kept.parent.iterdir())) == 3


def test_other_options_do_not_find_it_either(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_STANDARD", "c++20")
    compile_anew()
    assert len(list(kept.parent.iterdir())) == 2


def test_the_directory_is_private(kept: Path) -> None:
    assert kept.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_where_others_can_write_is_not_used(
    kept: Path, mode: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = compile_anew()
    cubins.write(kept.name, b"planted")
    assert compile_anew() == b"planted", "or this test is none"
    kept.parent.chmod(mode)
    assert compile_anew() == code
    assert cubins.read(kept.name) is None
    assert caplog.text.count("set QPALETTE_COMPILE_CACHE to another directory") == 1
    kept.unlink()
    compile_anew()
    assert not list(kept.parent.iterdir())


def test_nor_one_of_another_user(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = kept.parent.stat().st_uid + 1
    monkeypatch.setattr(cubins.os, "getuid", lambda: other)
    assert cubins.read(kept.name) is None


def test_a_cache_that_cannot_be_made_is_only_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QPALETTE_COMPILE_CACHE", str(tmp_path / "file"))
    assert compile_anew().startswith(b"\x7fELF")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> threading.Barrier:
    """A device that loads anything; two threads that load at once meet."""
    meeting = threading.Barrier(1)

    def load(name: str) -> object:
        meeting.wait(timeout=60)
        return object()

    fake = SimpleNamespace(
        Device=lambda index: SimpleNamespace(arch="90", set_current=lambda: None),
        ObjectCode=SimpleNamespace(from_cubin=lambda code: SimpleNamespace(get_kernel=load)),
    )
    monkeypatch.setattr(compiler, "_cuda_core", lambda: fake)
    monkeypatch.setattr(compiler, "compile_cubin", lambda *_: b"")
    return meeting


def test_a_loaded_kernel_stays(loads: threading.Barrier) -> None:
    """A captured CUDA graph may call it: nothing may unload it, however many come."""
    first = compiler.load_kernel(SOURCE, "stays", {"N": 0}, 0)
    for number in range(1, 3000):
        compiler.load_kernel(SOURCE, "stays", {"N": number}, 0)
    assert compiler.load_kernel(SOURCE, "stays", {"N": 0}, 0) is first


def test_threads_that_load_at_once_get_the_same_kernel(
    loads: threading.Barrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the kernel that one of them captured would be unloaded for the other's."""
    monkeypatch.setattr(loads, "_parties", 2)
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(compiler.load_kernel(SOURCE, "at once", {}, 0))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]
