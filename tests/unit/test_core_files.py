"""Files and folders that are whole or absent; one run at a time."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qpalette.core import files
from qpalette.core.errors import BusyError, InputError
from qpalette.core.files import contents, is_mount_point, locked, move_contents, write_whole

HOLDER = """
import sys, time
from pathlib import Path
from qpalette.core.files import locked

with locked(Path(sys.argv[1]), Path("/out")):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_is_refused_with_its_holder_until_that_is_killed(tmp_path):
    folder = tmp_path / "out.partial"
    holder = hold(folder)
    try:
        wanted = rf"/out is being written by another run \(process {holder.pid} on .+\): wait for it, or choose another"
        for _ in range(2):  # who is refused takes nothing from the holder
            with pytest.raises(BusyError, match=wanted), locked(folder, Path("/out")):
                pytest.fail("two hold it")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(folder, Path("/out")):
        assert (folder / files.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not folder.exists()


@pytest.mark.parametrize("end", ["let go", "killed"])
def test_who_waits_has_it_when_the_holder_ends_however_it_does(tmp_path, end):
    """With the folder that the holder removes as it leaves, and with one that stays."""
    folder, held = tmp_path / "out.partial", []
    holder = hold(folder)

    def wait() -> None:
        with locked(folder, Path("/out"), wait=True):
            held.append((folder / files.LOCK).read_text())

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    try:
        for thread in waiting:
            thread.start()
        waiting[0].join(timeout=0.5)
        assert not held, "the other one still has it"
    finally:
        holder.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
        holder.wait()
    for thread in waiting:
        thread.join(timeout=30)
    assert len(held) == 3
    assert all(text.startswith(f"process {os.getpid()} on ") for text in held)
    assert not folder.exists()


def test_what_is_left_in_the_folder_stays(tmp_path):
    folder = tmp_path / "out.partial"
    with locked(folder, tmp_path / "out"):
        (folder / "linear").touch()
    assert (folder / "linear").exists()
    with locked(folder, tmp_path / "out"):
        (folder / "linear").unlink()
    assert not folder.exists()
    folder.write_text("a file")
    with pytest.raises(InputError, match=r"out\.partial is no directory"), locked(folder, tmp_path / "out"):
        pass


def test_a_folder_that_comes_and_goes_is_never_held_twice(tmp_path):
    folder, inside, refused, wrong = tmp_path / "out.partial", [], [], []

    def often(me: int) -> None:
        for _ in range(300):
            try:
                with locked(folder, tmp_path / "out"):
                    inside.append(me)
                    if inside != [me]:
                        wrong.append(list(inside))
                    inside.remove(me)
            except InputError as error:
                refused.append(error)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=often, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(refused) < 4 * 300
    assert all("being written" in str(error) for error in refused)
    with locked(folder, tmp_path / "out"):
        pass
    assert not folder.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog, code):
    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(stream, how):
            raise OSError(code, "no locks available")

    monkeypatch.setattr(files, "fcntl", NoLocks)
    with locked(tmp_path / "out.partial", tmp_path / "out"):
        pass
    assert "out cannot be locked" in caplog.text
    assert "see to it that no other run writes it" in caplog.text


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("years")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / files.LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "out.partial", tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "years"


def test_a_file_is_written_whole_or_stays(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_two_that_write_a_file_at_once_write_it_whole(tmp_path, monkeypatch):
    file, flush = tmp_path / "file", os.fsync

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", flush)
        write_whole(file, "the other's")
        assert file.read_text() == "the other's"
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_whole(file, "own")
    assert file.read_text() == "own"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_mount_points_are_known(tmp_path, monkeypatch):
    assert is_mount_point(Path("/proc"))
    assert not is_mount_point(tmp_path)
    table = tmp_path / "mountinfo"
    (tmp_path / "a b").mkdir()
    escaped = str(tmp_path / "a b").replace(" ", r"\040")
    table.write_text(f"36 35 98:0 /part {escaped} rw,noatime - ext4 /dev/root rw\n")
    monkeypatch.setattr(files, "MOUNTS", table)
    assert is_mount_point(tmp_path / "a b"), "a part of the same file system"
    assert not is_mount_point(tmp_path)
    (tmp_path / "a b" / "lost+found").mkdir()
    (tmp_path / "lost+found").mkdir()
    assert contents(tmp_path / "a b") == []
    assert tmp_path / "lost+found" in contents(tmp_path)
    assert contents(tmp_path / "none") == []


def test_a_move_that_is_stopped_goes_on_and_the_config_is_last(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("a", "config.json", "z"):
        (source / name).write_text(name)
    original, moved = os.replace, []

    def stop(old, new):
        if len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(Path(new).name)
        original(old, new)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        move_contents(source, target)
    assert [file.name for file in target.iterdir()] == moved == ["a"]
    monkeypatch.undo()
    order = []
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append(Path(new).name), original(old, new)))
    move_contents(source, target)
    assert order == ["z", "config.json"]
    assert {file.name: file.read_text() for file in target.iterdir()} == {n: n for n in ("a", "config.json", "z")}
    assert not source.exists()


class Msvcrt:
    """Windows' locks of bytes, by file: they are mandatory, so that no byte of the text may be locked."""

    LK_NBLCK = 2

    def __init__(self):
        self.holders = {}

    def locking(self, descriptor, mode, count):
        status = os.fstat(descriptor)
        assert (mode, count) == (self.LK_NBLCK, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > status.st_size
        if self.holders.setdefault(status.st_ino, descriptor) != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")


def test_on_windows_a_second_run_is_told_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "msvcrt", Msvcrt(), raising=False)
    monkeypatch.setattr(files.sys, "platform", "win32")
    with locked(tmp_path / "work", tmp_path / "out"):
        assert (tmp_path / "work" / files.LOCK).read_text(encoding="utf-8").startswith("process ")
        with pytest.raises(BusyError, match=f"process {os.getpid()}"), locked(tmp_path / "work", tmp_path / "out"):
            pass
        assert (tmp_path / "work").is_dir(), "the second left it"
    assert not (tmp_path / "work").exists()
