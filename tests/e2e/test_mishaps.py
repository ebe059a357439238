"""What goes wrong on real machines: each mishap has one clear message, and nothing that was finished is lost."""

import errno
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline_quantize import HIDDEN, Q, files_of, run, write_llama
from test_pipeline_resume import Stop, encoded_names, finished_linears, stop_after

from qpalette.core.errors import ArtifactError, CheckpointError, InputError
from qpalette.formats import check_checksums, open_artifact, write_checksums
from qpalette.pipeline import partial
from qpalette.pipeline.encode import encode_tiles
from qpalette.runtime.device import parse_device
from qpalette.storage import StreamingSafetensorsWriter, export_checkpoint, open_checkpoint

QUANTIZE = import_module("qpalette.pipeline.quantize")  # the folder has a function of that name too
KILLS = 30

# Kills runs at random moments of their life, each going on where the last one was killed, until KILLS have died. Every
# run that comes to its end has its output compared; the next one then starts from nothing.
DRIVER = """
import os, pathlib, random, signal, sys, time, traceback
import qpalette.pipeline
from qpalette.models import find_groups
from qpalette.storage import open_checkpoint
from qpalette.plan import uniform_plan

source, folder, kills = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
checkpoint = open_checkpoint(source)
plan = uniform_plan(find_groups(checkpoint).groups, "nuq-3")

def start(output):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            qpalette.pipeline.quantize_checkpoint(checkpoint, output, plan)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid

def files_of(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}

begin = time.perf_counter()
assert os.waitpid(start(folder / "whole" / "out"), 0)[1] == 0
life = time.perf_counter() - begin
wanted, dice = files_of(folder / "whole" / "out"), random.Random(0)
killed = chains = 0
while killed < kills:
    output = folder / str(chains) / "out"
    while not output.exists():
        pid = start(output)
        if killed < kills:
            time.sleep(dice.uniform(0, life))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        killed += status == signal.SIGKILL
    assert files_of(output) == wanted, chains
    chains += 1
print(killed, chains)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    run(source, output)
    return output


def test_killed_at_thirty_random_moments(source, tmp_path):
    command = [sys.executable, "-c", DRIVER, str(source), str(tmp_path), str(KILLS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) == KILLS


def test_a_disk_that_fills_up_keeps_what_is_finished(source, quantized, tmp_path, monkeypatch):
    original, calls = StreamingSafetensorsWriter.write, []

    def write(self, name, tensor):
        calls.append(name)
        if len(calls) > 3 * 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name, tensor)

    monkeypatch.setattr(StreamingSafetensorsWriter, "write", write)
    with pytest.raises(InputError, match=r"out\.partial is full; finished linears are kept there: free some space"):
        run(source, tmp_path / "out")
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    names = encoded_names(monkeypatch)
    run(source, tmp_path / "out")
    assert len(names) == 14 - 5
    assert files_of(tmp_path / "out") == files_of(quantized)


def change_a_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("where", ["a tensor", "the distortion"])
def test_a_bit_lost_in_a_finished_linear(source, quantized, tmp_path, monkeypatch, caplog, where):
    with pytest.raises(Stop):
        run(source, tmp_path / "out", progress=stop_after(3))
    finished = finished_linears(tmp_path / "out")
    damaged = finished[0]
    change_a_byte(damaged, -40 if where == "a tensor" else damaged.read_bytes().index(b"[0.0") + 5)
    names = encoded_names(monkeypatch)
    run(source, tmp_path / "out")
    assert "its digest differs" in caplog.text
    assert len(names) == 14 - len(finished) + 1
    assert files_of(tmp_path / "out") == files_of(quantized)


def test_a_bit_lost_between_encoding_and_assembling(source, quantized, tmp_path, monkeypatch):
    """What is certified by SHA256SUMS is what was encoded; each finished linear is read once."""

    def damage(done, total, linear, distortion):
        if done == total:
            change_a_byte(sorted((tmp_path / "out.partial" / "linears").glob("*.safetensors"))[4], -40)

    with pytest.raises(CheckpointError, match=r"has lost a bit .*run the same command again: model\.layers\.\S+ alone"):
        run(source, tmp_path / "out", progress=damage)
    assert not (tmp_path / "out").exists()
    names, read = encoded_names(monkeypatch), []
    run(source, tmp_path / "out", progress=lambda *call: read.clear() if call[0] == call[1] else None)
    assert len(names) == 1
    assert files_of(tmp_path / "out") == files_of(quantized)
    original = partial._stored
    monkeypatch.setattr(partial, "_stored", lambda file, job: read.append(file) or original(file, job))
    run(source, tmp_path / "other" / "out")
    assert len(read) == len(set(read)) == 14


@pytest.mark.parametrize("spec", ["nuq-3", "nuq-2"])
def test_a_second_run_is_told_that_another_one_writes(source, quantized, tmp_path, spec):
    told = []

    def start_another(done, total, linear, distortion):
        with pytest.raises(
            InputError, match=rf"out is being written by another run \(process {os.getpid()} on"
        ) as error:
            run(source, tmp_path / "out", spec, overwrite=True)
        told.append(error)

    run(source, tmp_path / "out", progress=start_another)
    assert len(told) == 14
    assert files_of(tmp_path / "out") == files_of(quantized)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def mount(directory: Path, monkeypatch) -> None:
    """`directory` is one that cannot be renamed, nor renamed over, and has what a new file system has."""
    replace, ismount = os.replace, os.path.ismount

    def busy(old, new):
        if directory in (Path(old), Path(new)):
            raise OSError(errno.EBUSY, "Device or resource busy", str(directory))
        replace(old, new)

    (directory / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == directory or ismount(path))


def test_the_output_is_a_volume(source, quantized, tmp_path, monkeypatch):
    out = tmp_path / "out"
    mount(out, monkeypatch)
    with pytest.raises(Stop):
        run(source, out, progress=stop_after(3))
    finished = list(out.rglob("linears/*.safetensors"))
    names = encoded_names(monkeypatch)
    run(source, out)
    assert len(names) == 14 - len(finished)
    assert files_of(out) == files_of(quantized)
    with pytest.raises(ArtifactError, match="exists already"):
        run(source, out, "nuq-2")
    assert files_of(out) == files_of(quantized)
    run(source, out, "nuq-2", overwrite=True)
    assert open_artifact(out).records[Q].spec == "nuq-2"
    assert check_checksums(out) == len(files_of(quantized)) - 1
    assert {path.name for path in out.iterdir()} == {*files_of(quantized), "lost+found"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_volume_with_something_in_it_is_kept(source, tmp_path, monkeypatch):
    mount(tmp_path / "out", monkeypatch)
    (tmp_path / "out" / "thesis.txt").write_text("years")
    for overwrite, message in ((False, "exists already"), (True, "no quantized model")):
        with pytest.raises(ArtifactError, match=message):
            run(source, tmp_path / "out", overwrite=overwrite)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"thesis.txt", "lost+found"}


def test_a_plain_export_into_a_volume(source, tmp_path, monkeypatch):
    mount(tmp_path / "out", monkeypatch)
    checkpoint = open_checkpoint(source)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert open_checkpoint(tmp_path / "out").tensors == checkpoint.tensors
    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_a_source_that_changes_between_two_runs(tmp_path, monkeypatch, caplog):
    """Where no sample of the fingerprint lies: only the linear that differs is quantized again."""
    big = torch.randn(65536, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    source = write_llama(tmp_path / "source", model__embed_tokens__weight=big)
    with pytest.raises(Stop):
        run(source, tmp_path / "out", progress=stop_after(6))
    finished = finished_linears(tmp_path / "out")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].clone()
    tensors[f"{Q}.weight"][3, 3] = 1
    before = fingerprint(source)
    save_file(tensors, file)
    assert fingerprint(source) == before
    names = encoded_names(monkeypatch)
    run(source, tmp_path / "out")
    assert f"{Q} has changed: it is quantized again" in caplog.text
    assert names[0] == Q
    assert len(names) == 14 - len(finished) + 1


def fingerprint(source: Path) -> str:
    return open_checkpoint(source).fingerprint


def test_a_source_that_changes_meanwhile(tmp_path):
    source = write_llama(tmp_path / "source")

    def touch(done, total, linear, distortion):
        os.utime(source / "model.safetensors", ns=(0, 0))

    with pytest.raises(CheckpointError, match="changed while they were read; run the same command again"):
        run(source, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out")


def test_a_source_cut_short_meanwhile(tmp_path):
    source = write_llama(tmp_path / "source")
    file = source / "model.safetensors"

    def cut(done, total, linear, distortion):
        os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(CheckpointError, match=r"ends too early: the file changed"):
        run(source, tmp_path / "out", progress=cut)
    assert not (tmp_path / "out").exists()


def test_a_bit_lost_in_a_copy_of_the_result(quantized, tmp_path):
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    write_checksums(copy)
    assert check_checksums(copy) == len(files_of(quantized)) - 1 + 1  # without itself, with the template
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=copy, check=False).returncode == 0
    change_a_byte(copy / "model.safetensors", -1000)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is not what was written: its SHA-256 differs"):
        check_checksums(copy)
    write_checksums(copy)
    change_a_byte(copy / "additional_chat_templates" / "tools.jinja", 2)
    with pytest.raises(ArtifactError, match=r"tools\.jinja is not what was written"):
        check_checksums(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "SHA256SUMS").write_text("".join(reversed((copy / "SHA256SUMS").read_text().splitlines(True))))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        check_checksums(copy)
    for name in ("../secret", "/secret", "a/../../secret", "a/../b", "./a", "a/./b"):
        (copy / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(ArtifactError, match="line 1 is no SHA-256"):
            check_checksums(copy)


@pytest.mark.parametrize("spec", ["nuq-4", "tcq-3-L12"])
def test_rows_that_are_constant_and_one_huge_outlier(tmp_path, spec):
    weight = 0.02 * torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))
    weight[2], weight[4, 4] = 0.5, 2000
    source = write_llama(tmp_path / "source", **{f"{Q}.weight".replace(".", "__"): weight})
    report = run(source, tmp_path / "out", spec)
    scales = open_artifact(tmp_path / "out").read_linear(Q).scales.view(torch.float16)
    assert scales.isfinite().all()
    assert report.linears[0].distortion < 0.1  # the outlier is spread over its row, and its row's error is its own


class Short(import_module("qpalette.backends.ref").backend.__class__):
    """A device on which only `room` tiles fit."""

    def __init__(self, room: int) -> None:
        self.room, self.sizes = room, []

    def encode(self, spec, tiles):
        self.sizes.append(len(tiles))
        if len(tiles) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().encode(spec, tiles)


def test_a_gpu_short_of_memory_takes_smaller_batches(source, quantized, tmp_path, monkeypatch):
    short = Short(room=3)
    monkeypatch.setattr("qpalette.pipeline.encode.select", lambda *_: short)
    run(source, tmp_path / "out")
    assert max(short.sizes) > 3 >= min(short.sizes)
    assert files_of(tmp_path / "out") == files_of(quantized)
    with pytest.raises(InputError, match=r"cpu has no memory left to encode one tile of nuq-3: .* use --device cpu"):
        encode_tiles(Short(room=0), "nuq-3", torch.zeros(2, 256))


def test_a_gpu_without_room_for_a_linear(source, tmp_path, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qpalette.pipeline.work.encode_linear", no_room)
    with pytest.raises(InputError, match=r"no memory left for model\.layers\.0\.self_attn\.qkv_proj .*--device cpu"):
        run(source, tmp_path / "out")


def test_no_gpu(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"there is no device cuda: torch .* finds 0 CUDA device"):
        run(source, tmp_path / "out", device="cuda")
    with pytest.raises(InputError, match="'gpu' is not a device"):
        parse_device("gpu")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_by_ctrl_c(source, quantized, tmp_path, monkeypatch):
    def interrupt(done, total, linear, distortion):
        if linear == Q:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", progress=interrupt)
    finished = finished_linears(tmp_path / "out")
    assert 0 < len(finished) < 14
    names = encoded_names(monkeypatch)
    run(source, tmp_path / "out")
    assert len(names) == 14 - len(finished)
    assert files_of(tmp_path / "out") == files_of(quantized)
