"""Files and directories that are whole or absent, and the lock that keeps two runs from writing the same ones."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from qpalette.core.errors import BusyError, InputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

LOCK = "lock"
LAST = "config.json"  # a directory with it is a model: the last file to come, the first to go
LOST_AND_FOUND = "lost+found"  # in the root of a new ext file system
MOUNTS = Path("/proc/self/mountinfo")
ATTEMPTS = 100  # to take a lock whose file its holder removes again and again
BEHIND = 1 << 30  # where Windows locks a byte: a locked one cannot be read, and who holds the lock is to be read
WAIT_SECONDS = 0.5
_number = count()  # of a temporary file
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


def write_whole(file: Path, text: str) -> None:
    """`file` has all of `text`, or is as it was: written beside it, flushed to disk, renamed. Where two write it at
    once, each has a name of its own until then, and the last one stays."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.{next(_number)}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path, what: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder`, which is made, for one run; it is removed when nothing but the lock is left in it.

    The system lets go of the lock of a process that dies, however it dies. Where the file system has no locks, a
    warning says that nobody watches. While another run holds it, BusyError is raised at once: `what` it writes, and
    which process that is; or, with `wait`, this call waits for it.
    """
    stream = _taken(folder, what, wait)
    try:
        yield
    finally:
        # In this order, and still held: who opened the file before sees that it is gone, and makes another. Windows
        # does not remove an open file, and so none that another run has opened.
        if sys.platform == "win32":
            stream.close()
        with suppress(OSError):  # of a folder that is gone, or that another run has just come to
            if [entry.name for entry in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
        stream.close()


def _taken(folder: Path, what: Path, wait: bool) -> IO[str]:
    """The open lock file. Python's files are closed in processes that are started: only this one holds it."""
    for _ in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except (FileNotFoundError, FileExistsError):
            continue  # its holder has just removed the folder
        stream = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
        try:
            _lock(stream, what, wait)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {socket.gethostname()}")
                stream.flush()
                return stream
        except FileNotFoundError:
            pass  # as above
        except BaseException:
            stream.close()
            raise
        stream.close()
    raise InputError(f"{folder} is no directory, or comes and goes; remove it, or choose another output directory")


def _lock(stream: IO[str], what: Path, wait: bool) -> None:
    try:
        _take(stream.fileno(), wait)
    except BlockingIOError as error:
        holder = stream.read(200) or "its process is not known"
        raise BusyError(
            f"{what} is being written by another run ({holder}): wait for it, or choose another output directory"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): see to it that no other run writes it", what, error.strerror)


def _take(descriptor: int, wait: bool) -> None:
    """Raises BlockingIOError while another process has it."""
    if sys.platform == "win32":
        os.lseek(descriptor, BEHIND, os.SEEK_SET)
        try:
            while True:
                with suppress(PermissionError):
                    return msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "another process has it")
                time.sleep(WAIT_SECONDS)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def is_mount_point(directory: Path) -> bool:
    """Whether something is mounted on `directory`: it cannot be renamed, nor can another take its place."""
    if os.path.ismount(directory):
        return True
    try:  # a part of the same file system that is mounted there looks like any directory
        mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    places = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in mounts)
    return str(directory.resolve()) in places


def contents(directory: Path) -> list[Path]:
    """What lies in `directory`, but for what a new file system comes with; nothing where there is no directory."""
    if not directory.is_dir():
        return []
    found = sorted(directory.iterdir())
    own = directory / LOST_AND_FOUND
    return [entry for entry in found if entry != own] if own in found and is_mount_point(directory) else found


def move_contents(source: Path, target: Path) -> None:
    """Everything in `source` goes to `target` on the same file system, config.json last; `source` is removed.

    Stopped in between, calling it again finishes.
    """
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == LAST, entry.name)):
        os.replace(entry, target / entry.name)
    source.rmdir()
