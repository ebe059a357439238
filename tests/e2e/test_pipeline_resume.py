"""Killed at any point and run again, a run gives the bytes of an uninterrupted one."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from test_pipeline_quantize import files_of, plan_of, run, write_llama

from qpalette.core.errors import ArtifactError
from qpalette.pipeline import quantize_checkpoint, work
from qpalette.pipeline.partial import PartialResults
from qpalette.plan import Plan
from qpalette.storage import open_checkpoint

QUANTIZE = import_module("qpalette.pipeline.quantize")  # the folder has a function of that name too

# Forks one process per crash point before any thread exists. Each dies by SIGKILL at its n-th call that changes the
# disk, so that the chain crashes in, before and after every step; the last one survives. Whenever the output has a
# config.json, it is a model and each of its files is what was written. A "volume" cannot be renamed.
DRIVER = """
import errno, os, pathlib, shutil, signal, sys, traceback
import qpalette.pipeline
import transformers.models.llama.modeling_llama  # here, not in each process
from qpalette.models import find_groups
from qpalette.storage import open_checkpoint
from qpalette.core.errors import ArtifactError
from qpalette.formats import check_checksums, open_artifact
from qpalette.plan import uniform_plan

source, output, spec, points = sys.argv[1], sys.argv[2], sys.argv[3], map(int, sys.argv[4].split(","))
kinds = sys.argv[5:]
overwrite = "overwrite" in kinds

if "volume" in kinds:
    replace, ismount = os.replace, os.path.ismount

    def busy(old, new):
        if output in map(str, (old, new)):
            raise OSError(errno.EBUSY, "Device or resource busy", output)
        replace(old, new)

    os.replace, os.path.ismount = busy, lambda path: str(path) == output or ismount(path)

def trap(owner, name, countdown):
    original = getattr(owner, name)
    def call(*arguments, **options):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(owner, name, call)

def attempt(point):
    countdown = [point]
    for owner, name in [(os, "fsync"), (os, "replace"), (shutil, "rmtree"), (shutil, "copyfile"),
                        (pathlib.Path, "write_text"), (pathlib.Path, "mkdir"), (pathlib.Path, "unlink")]:
        trap(owner, name, countdown)
    checkpoint = open_checkpoint(source)
    plan = uniform_plan(find_groups(checkpoint).groups, spec)
    try:
        qpalette.pipeline.quantize_checkpoint(checkpoint, output, plan, overwrite=overwrite)
    except ArtifactError as error:
        assert "exists already" in str(error) and pathlib.Path(output).exists()

find_groups(open_checkpoint(source))  # the model's class is imported once, for all
killed = 0
for point in points:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            attempt(point)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    killed += status == signal.SIGKILL
    if (pathlib.Path(output) / "config.json").exists():
        open_artifact(output)
        check_checksums(pathlib.Path(output))
    elif overwrite and "volume" not in kinds:
        assert (pathlib.Path(output + ".partial") / "replaced" / "config.json").exists()
print(killed)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    run(source, output)
    return files_of(output)


def crash_chain(source: Path, output: Path, spec: str, points: list[int], *kinds: str) -> int:
    """How many of the runs were killed; the last of `points` should be one that is never reached."""
    arguments = [str(source), str(output), spec, ",".join(map(str, points)), *kinds]
    result = subprocess.run([sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_a_chain_of_crashes_ends_in_the_same_bytes(source, uninterrupted, tmp_path):
    output = tmp_path / "out"
    assert crash_chain(source, output, "nuq-3", [1, 2, 3, 4, 5, 6, 9, 12, 14, 15, 16, 17, 18, 10**6]) >= 10
    assert files_of(output) == uninterrupted


def test_crashes_while_assembling(source, uninterrupted, tmp_path):
    """Every run comes with the linears finished, and dies at its first, second, ... step of assembling."""
    output = tmp_path / "out"
    with pytest.raises(Stop):
        run(source, output, progress=stop_after(14))
    assert crash_chain(source, output, "nuq-3", [*range(1, 16), 10**6]) >= 8
    assert files_of(output) == uninterrupted


def test_crashes_in_a_volume(source, uninterrupted, tmp_path):
    """Every step of moving the files in; with the linears finished, a run has about thirty steps."""
    output = tmp_path / "out"
    output.mkdir()
    assert crash_chain(source, output, "nuq-3", [30, *range(9, 34), 10**6], "volume") >= 15
    assert files_of(output) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kinds", [("overwrite",), ("overwrite", "volume")])
def test_crashes_while_overwriting(source, uninterrupted, tmp_path, kinds):
    """There is the old model or the new one, or none yet; the last run puts the new one there."""
    output = tmp_path / "out"
    run(source, output, "nuq-2")
    assert crash_chain(source, output, "nuq-3", [*range(12, 42), 10**6], *kinds) >= 15
    assert files_of(output) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_crash_with_the_trellis(source, tmp_path):
    assert crash_chain(source, tmp_path / "a" / "out", "tcq-2-L12", [20]) == 1
    run(source, tmp_path / "a" / "out", "tcq-2-L12")
    run(source, tmp_path / "b" / "out", "tcq-2-L12")
    assert files_of(tmp_path / "a" / "out") == files_of(tmp_path / "b" / "out")


class Stop(Exception):
    pass


def stop_after(count: int):
    names: list[str] = []

    def progress(done: int, total: int, linear: str, distortion: float) -> None:
        names.append(linear)
        if len(names) == count:
            raise Stop

    return progress


def finished_linears(output: Path) -> list[Path]:
    """That an interrupted run left: those that it told of, and what was under way."""
    return sorted((output.parent / f"{output.name}.partial" / "linears").glob("*.safetensors"))


def encoded_names(monkeypatch) -> list[str]:
    names: list[str] = []
    original = work.encode_linear

    def record(name, *arguments):
        names.append(name)
        return original(name, *arguments)

    monkeypatch.setattr(work, "encode_linear", record)
    return names


def test_finished_linears_are_not_encoded_again(source, uninterrupted, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run(source, tmp_path / "out", progress=stop_after(5))
    assert not (tmp_path / "out").exists()
    finished = finished_linears(tmp_path / "out")
    assert 5 <= len(finished) < 14
    names = encoded_names(monkeypatch)
    run(source, tmp_path / "out")
    assert len(names) == 14 - len(finished)
    assert files_of(tmp_path / "out") == uninterrupted


def test_another_plan_never_meets_old_results(source, uninterrupted, tmp_path, monkeypatch):
    checkpoint, plan = open_checkpoint(source), plan_of(source)
    for other in (plan_of(source, "nuq-2"), Plan(plan.specs, seed=1), Plan(plan.specs, rotation="block-16")):
        with pytest.raises(Stop):
            quantize_checkpoint(checkpoint, tmp_path / "out", other, progress=stop_after(3))
    names = encoded_names(monkeypatch)
    run(source, tmp_path / "out")
    assert len(names) == 14
    assert files_of(tmp_path / "out") == uninterrupted


def test_a_damaged_partial_file_is_made_again(source, uninterrupted, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run(source, tmp_path / "out", progress=stop_after(2))
    finished = finished_linears(tmp_path / "out")
    damaged = finished[0]
    damaged.write_bytes(damaged.read_bytes()[:-50])
    names = encoded_names(monkeypatch)
    run(source, tmp_path / "out")
    assert len(names) == 14 - len(finished) + 1
    assert files_of(tmp_path / "out") == uninterrupted


def test_an_output_that_appears_meanwhile_is_kept(source, tmp_path, monkeypatch):
    original = QUANTIZE.export_checkpoint

    def export(*arguments):
        original(*arguments)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("someone else's")

    monkeypatch.setattr(QUANTIZE, "export_checkpoint", export)
    with pytest.raises(ArtifactError, match="exists already"):
        run(source, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "someone else's"
    assert PartialResults(tmp_path / "out.partial", ()).assembled.exists()
