"""Where things are kept that can be made again: compiled kernels, dequantized models."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = "QPALETTE_CACHE"
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
