"""Any checkpoint as a plain Hugging Face directory: its own, or a dequantized copy in a cache of bounded size."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from qpalette.core.cache import CACHE, private_folder
from qpalette.core.errors import CheckpointError, InputError
from qpalette.storage.base import Checkpoint
from qpalette.storage.export import export_checkpoint

CACHE_GB = "QPALETTE_CACHE_GB"
DEFAULT_GB = 50.0  # three models of 8 thousand million weights in 16 bits
STALE_SECONDS = 86400.0  # after which what another process has not finished is nobody's
MAKERS = ("qpalette", "gguf", "transformers")  # whose releases decide what a copy holds


def plain_directory(checkpoint: Checkpoint) -> Path:
    """A Hugging Face directory with the weights of `checkpoint`: its own, or a dequantized copy in the cache.

    Copies that were not used for longest are removed while all together have more than $QPALETTE_CACHE_GB (50)
    gigabytes; this one stays. Raises CheckpointError when the cache cannot be written, InputError when that limit is
    no number.
    """
    if checkpoint.format == "safetensors":
        return checkpoint.files[0].parent
    limit = _limit_bytes()
    try:
        directory = private_folder("exported") / _key(checkpoint.fingerprint)
        if not directory.exists():
            _export(checkpoint, directory)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or 'the cache'} cannot be written ({error.strerror}); set {CACHE} to a directory with "
            f"room for {checkpoint.total_bytes / 1e9:.1f} GB"
        ) from error
    with suppress(OSError):  # of a cache that others share
        os.utime(directory)  # the time of its last use
        _shrink(directory, limit)
    return directory


def _export(checkpoint: Checkpoint, directory: Path) -> None:
    try:
        export_checkpoint(checkpoint, directory)
    except (OSError, CheckpointError):
        if not directory.exists():  # otherwise another process has just written the same
            raise


def _limit_bytes() -> float:
    text = os.environ.get(CACHE_GB) or str(DEFAULT_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise InputError(f"{CACHE_GB} is '{text}': give gigabytes, such as {DEFAULT_GB:g}")
    return 1e9 * gigabytes


def _key(fingerprint: str) -> str:
    """Of a model and of what exported it: a copy by other code may differ."""
    here = code_digest(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(repr((fingerprint, here, [version(maker) for maker in MAKERS])).encode()).hexdigest()


def code_digest(files: Iterable[Path]) -> str:
    """SHA-256 of sources; a number to raise by hand would be forgotten."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _shrink(kept: Path, limit: float) -> None:
    """Remove the copies that were not used for longest, and what was left unfinished, down to `limit` bytes."""
    others = sorted((entry for entry in kept.parent.iterdir() if entry != kept), key=_last_use)
    total = sum(map(_size, [kept, *others]))
    for entry in others:
        unfinished = entry.name.startswith(".")
        if time.time() - _last_use(entry) > STALE_SECONDS if unfinished else total > limit:
            total -= _size(entry)
            _remove(entry)


def _last_use(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # another process shrinks the cache as well
        return 0.0


def _size(directory: Path) -> int:
    try:
        return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    except FileNotFoundError:  # as above
        return 0


def _remove(directory: Path) -> None:
    """Under another name first: half a copy is never found."""
    gone = directory.with_name(f".{directory.name}.{os.getpid()}.gone")
    with suppress(FileNotFoundError):  # as above
        os.replace(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)
