"""Where things are kept that can be made again: compiled kernels, dequantized models, models quantized on load."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from qpalette.core.errors import InputError

CACHE = "QPALETTE_CACHE"
CACHE_GB = "QPALETTE_CACHE_GB"
DEFAULT_GB = 50.0  # three models of 8 thousand million weights in 16 bits
STALE_SECONDS = 86400.0  # after which what another process has not finished is nobody's
COMPILE_CACHE = "QPALETTE_COMPILE_CACHE"


def cache_directory() -> Path:
    """$QPALETTE_CACHE, or ~/.cache/qpalette."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "qpalette")


def private_folder(name: str) -> Path:
    """A folder of the cache, which nobody else may read or write; made when it is not there."""
    for folder in (cache_directory(), cache_directory() / name):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def compile_cache_directory() -> Path:
    """Of compiled code, which is found by its content: $QPALETTE_COMPILE_CACHE, or `cache_directory`."""
    return Path(os.environ.get(COMPILE_CACHE) or cache_directory())


def limit_bytes() -> float:
    """Of the models of one kind that a cache keeps: $QPALETTE_CACHE_GB (50) gigabytes. Raises InputError when that is
    no number."""
    text = os.environ.get(CACHE_GB) or str(DEFAULT_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise InputError(f"{CACHE_GB} is '{text}': give gigabytes, such as {DEFAULT_GB:g}")
    return 1e9 * gigabytes


def code_digest(files: Iterable[Path]) -> str:
    """SHA-256 of sources; a number to raise by hand would be forgotten."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(files))).hexdigest()


def mark_used(kept: Path, limit: float) -> None:
    """`kept`, a directory, is in use. Of those beside it the ones that were not used for longest are removed, and what
    was left unfinished (.NAME, NAME.partial), down to `limit` bytes."""
    with suppress(OSError):  # of a cache that others share
        os.utime(kept)
        others = sorted((entry for entry in kept.parent.iterdir() if entry != kept), key=_last_use)
        total = sum(map(_size, [kept, *others]))
        for entry in others:
            unfinished = entry.name.startswith(".") or entry.name.endswith(".partial")
            if time.time() - _last_change(entry) > STALE_SECONDS if unfinished else total > limit:
                total -= _size(entry)
                remove(entry)


def remove(directory: Path) -> None:
    """Under another name first: half a copy is never found."""
    gone = directory.with_name(f".{directory.name}.{os.getpid()}.gone")
    with suppress(FileNotFoundError):  # another process shrinks the cache as well
        os.replace(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _last_use(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # as above
        return 0.0


def _last_change(entry: Path) -> float:
    """Of anything in it: a long run adds to a folder far below."""
    return max(map(_last_use, [entry, *entry.rglob("*")]))


def _size(directory: Path) -> int:
    try:
        return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    except FileNotFoundError:  # as above
        return 0
