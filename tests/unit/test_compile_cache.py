"""Compiled code on disk: found again, never trusted when it should not be, and never worth an exception."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import prange, types

from qpalette.backends.cpu import jit
from qpalette.backends.cpu.byte_decoders import byte_decoder_of
from qpalette.backends.cpu.byte_matmul import make_byte_kernel
from qpalette.backends.cpu.calls import SIGNATURE
from qpalette.backends.cpu.decoders import decoder_of
from qpalette.backends.cpu.matmul import make_kernels
from qpalette.backends.cpu.step import ahead
from qpalette.backends.cpu.step import scalars as scalars_of_steps
from qpalette.backends.cpu.step.dense import make_dense
from qpalette.codes import parse_spec

RESULT = [20.0, 20.0]  # twice 0 + 1 + 2 + 3 + 4
SIGNATURES = 3


def kernels():  # type: ignore[no-untyped-def]
    """Two, one of them parallel, small enough to compile in a test."""

    @jit.entry("test double", parallel=True)
    def double(x):  # type: ignore[no-untyped-def]
        for i in prange(x.size):
            x[i] *= 2

    @jit.entry("test total")
    def total(x):  # type: ignore[no-untyped-def]
        return x.sum()

    return double, total


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QPALETTE_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_directory", jit._directory.__wrapped__)  # asked anew each time
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process leaves that compiles the kernels above."""
    folder = tmp_path_factory.mktemp("compiled") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPALETTE_COMPILE_CACHE", str(folder))
        patch.setattr(jit, "_directory", jit._directory.__wrapped__)
        assert run() == {"hits": 0, "misses": SIGNATURES}
    return folder


@pytest.fixture
def kept(cache: Path, compiled: Path) -> Path:
    """`cache`, with a copy of these files in it: parallel code takes numba seconds."""
    return shutil.copytree(compiled, cache)


def run() -> dict[str, int]:
    """The kernels above in this process, as a fresh one would find them: new dispatchers, nothing compiled. What was
    found on disk, and what was not."""
    double, total = kernels()
    x = np.arange(5, dtype=np.float32)
    double(x)
    result = [float(total(x)), float(total(x.astype(np.float64)))]
    stats = double.stats, total.stats
    assert result == RESULT
    return {
        "hits": sum(sum(each.cache_hits.values()) for each in stats),
        "misses": sum(sum(each.cache_misses.values()) for each in stats),
    }


def of_one_name(factor: int):  # type: ignore[no-untyped-def]
    """A kernel that calls another one; what that does is in its closure, and not in any name."""

    @jit.kernel
    def multiples(n):  # type: ignore[no-untyped-def]
        return factor * n if n < 2 else multiples(n - 1) + multiples(n - 2)  # so often that it is not inlined

    @jit.entry(f"test multiples of {factor}")
    def called(n):  # type: ignore[no-untyped-def]
        return multiples(n)

    return called


def in_a_process(program: str) -> object:
    command = [sys.executable, "-c", f"import json; from tests.unit.test_compile_cache import *; {program}"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def scalars() -> list[Any]:
    """Kernels of steps, of new dispatchers."""
    scalars_of_steps.compute_kernel.cache_clear()
    return [scalars_of_steps.compute_kernel(name, 0, False) for name in ("neg", "exp")]


def test_what_is_on_disk_is_not_missing(cache: Path) -> None:
    _, total = kernels()
    signature = (types.Array(types.float32, 1, "C"),)
    assert jit.is_missing(total, signature)
    total.compile(signature)
    assert not jit.is_missing(total, signature)
    assert jit.is_missing(total, (types.Array(types.float64, 1, "C"),))


@pytest.mark.parametrize("in_bytes", [False, True])
def test_products_are_kept_on_disk(in_bytes: bool) -> None:
    """They choose a number of threads, by functions of which no address may be in the code: such code is not kept. In
    the cache of all tests, whose files are of these sources: a product takes half a minute to compile."""
    quantizer, signature = parse_spec("nuq-2"), (types.int64,) * 5
    if in_bytes:
        found = byte_decoder_of(quantizer)
        if found is None:
            pytest.skip("this processor multiplies no bytes")
        linear = make_byte_kernel.__wrapped__(found.way)
    else:
        linear = make_kernels.__wrapped__(decoder_of(quantizer)[0])[0]
    linear.compile(signature)
    assert not jit.is_missing(linear, signature)


def test_dense_products_of_steps_are_kept_on_disk() -> None:
    """As those of packed matrices."""
    for linear in make_dense.__wrapped__(0):
        ahead.compile_kernels([linear])
    assert not any(jit.is_missing(each, SIGNATURE) for each in make_dense.__wrapped__(0))


def test_kernels_of_steps_are_compiled_by_a_process_of_their_own(cache: Path, monkeypatch) -> None:
    ahead.compile_apart(scalars())
    assert len(files(cache)) == 2
    found = scalars()
    ahead.compile_kernels(found)
    assert [(sum(each.stats.cache_hits.values()), sum(each.stats.cache_misses.values())) for each in found] == [
        (1, 0)
    ] * 2
    monkeypatch.setattr(subprocess, "Popen", None)  # what is there needs no process
    ahead.compile_apart(scalars())


def test_a_process_that_compiles_reads_no_code_of_the_folder_it_is_in(cache: Path, monkeypatch, tmp_path) -> None:
    """It may be a model's."""
    for name in ("numba", "numpy", "qpalette"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    ahead.compile_apart(scalars())
    assert len(files(cache)) == 2
    assert not (tmp_path / "ran").exists()


def test_where_no_process_can_be_started_this_one_compiles(cache: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no processes left")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    kernels_of_a_step = scalars()
    ahead.compile_apart(kernels_of_a_step)
    ahead.compile_kernels(kernels_of_a_step)
    assert all(map(ahead.is_compiled, kernels_of_a_step))


def test_a_process_that_compiles_nothing_leaves_it_to_this_one(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(ahead, "MODULE", "qpalette.no_such_module")
    kernels_of_a_step = scalars()
    ahead.compile_apart(kernels_of_a_step)
    ahead.compile_kernels(kernels_of_a_step)
    assert all(map(ahead.is_compiled, kernels_of_a_step))


def test_a_process_that_ends_while_another_compiles_ends_it_and_says_nothing(cache: Path) -> None:
    program = """
import threading, time
from qpalette.backends.cpu.calls import SIGNATURE
from qpalette.backends.cpu.step import ahead
from qpalette.generation.compilation import beside
every = ahead.every_kernel()
beside("compile", lambda: (ahead.compile_apart(every.values()), ahead.compile_kernels(every.values())))
time.sleep(0.5)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_every_kernel_of_a_step_has_a_name_of_its_own() -> None:
    every = ahead.every_kernel()
    assert all(jit.name_of(kernel) == name for name, kernel in every.items())
    assert {"step run", "step attention 0", "step floats silu 0", "step integers add 0"} <= every.keys()


def test_code_of_several_processes_is_not_mixed_up(cache: Path) -> None:
    """Each process compiles one kernel; the last finds both on disk."""
    expected = {3: 3 * 55, 5: 5 * 55}  # times the tenth number of Fibonacci
    for factor, result in expected.items():
        assert in_a_process(f"print(json.dumps(of_one_name({factor})(10)))") == result
    both = "kernels = of_one_name(3), of_one_name(5); print(json.dumps([each(10) for each in kernels]))"
    assert in_a_process(both) == list(expected.values())
    assert len(files(cache)) == len(expected)


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.bin"))


def test_a_second_process_compiles_nothing(cache: Path) -> None:
    first, second = (in_a_process("print(json.dumps(run()))") for _ in range(2))
    assert first == {"hits": 0, "misses": SIGNATURES}
    assert second == {"hits": SIGNATURES, "misses": 0}
    assert all(directory.stat().st_mode & 0o777 == 0o700 for directory in (cache / "numba").iterdir())


DAMAGES = ("empty", "cut", "flipped", "text", "swapped")


@pytest.mark.parametrize(("which", "damage"), [(i % SIGNATURES, damage) for i, damage in enumerate(DAMAGES)])
def test_a_damaged_file_is_compiled_anew(kept: Path, which: int, damage: str) -> None:
    """It alone; each of the files once or twice."""
    contents = [file.read_bytes() for file in files(kept)]
    assert len(contents) == SIGNATURES
    content = contents[which]
    middle = len(content) // 2
    files(kept)[which].write_bytes(
        {
            "empty": b"",
            "cut": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "text": b"no kernel at all",
            "swapped": contents[which - 1],  # whole, but of another signature
        }[damage]
    )
    assert run() == {"hits": SIGNATURES - 1, "misses": 1}
    assert run() == {"hits": SIGNATURES, "misses": 0}  # and repaired


@pytest.mark.parametrize("whose", ["of these sources", "of all"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_write_is_none(kept: Path, mode: int, whose: str) -> None:
    (directory,) = (kept / "numba").iterdir()
    assert jit._directory() == directory
    (directory if whose == "of these sources" else kept / "numba").chmod(mode)
    assert jit._directory() is None


def test_a_directory_of_someone_else_is_not_used(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: (kept / "numba").stat().st_uid + 1)
    assert jit._directory() is None
    assert run() == {"hits": 0, "misses": SIGNATURES}


def test_a_link_in_place_of_the_directory_is_none(kept: Path) -> None:
    (directory,) = (kept / "numba").iterdir()
    directory.rename(kept / "elsewhere")
    directory.symlink_to(kept / "elsewhere")
    assert jit._directory() is None


def test_what_cannot_be_written_is_only_slow(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where a directory should be")
    assert run() == {"hits": 0, "misses": SIGNATURES}
    cache.unlink()

    def full(*arguments: object, **named: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(jit.tempfile, "NamedTemporaryFile", full)
    assert run() == {"hits": 0, "misses": SIGNATURES}
    assert not files(cache)


def test_other_sources_have_another_directory(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(Path(jit.__file__).parent, tmp_path / "sources", ignore=shutil.ignore_patterns("*.pyc"))
    same = jit._directory()
    monkeypatch.setattr(jit, "__file__", str(folder / "jit.py"))
    assert jit._directory() == same
    for source in sorted(folder.rglob("*.py")):
        before = jit._directory()
        source.write_bytes(source.read_bytes() + b"\n")
        assert jit._directory() != before
    monkeypatch.setattr(jit.numba, "__version__", "0.0")
    assert jit._directory() != before


def test_directories_long_unused_are_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for i in range(jit.KEPT + 3):
        monkeypatch.setattr(jit, "_digest", lambda i=i: f"{i:032}")
        made.append(jit._directory())
        os.utime(made[-1], (i, i))
    assert sorted((cache / "numba").iterdir()) == made[-jit.KEPT :]
