"""Compiled kernels on disk: each file is its digest, then the code. What is damaged is not there."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

from qpalette.core.cache import COMPILE_CACHE, compile_cache_directory

logger = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size


def read(key: str) -> bytes | None:
    """The code kept under `key`; None where there is none, or not what was written."""
    directory = _directory()
    if directory is None:
        return None
    try:
        content = (directory / key).read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def write(key: str, code: bytes) -> None:
    """By rename, so that another process sees all of it or nothing. A cache that cannot be written is only slow."""
    directory = _directory()
    if directory is None:
        return
    try:
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as temporary:
            temporary.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary.name, directory / key)
    except OSError:
        return


def _directory() -> Path | None:
    """Of this user alone, since its content runs; None where there is no such directory, and none can be made."""
    directory = compile_cache_directory() / "cubins"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError:
        return None
    if os.name == "posix" and (found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        _warn_of(directory)
        return None
    return directory


@cache
def _warn_of(directory: Path) -> None:
    """Once for each."""
    logger.warning(
        "%s is not yours alone, so compiled kernels are not kept there: set %s to another directory",
        *(directory, COMPILE_CACHE),
    )
