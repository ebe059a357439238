"""Where things are kept that can be made again: compiled kernels, dequantized models."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = "QPALETTE_CACHE"


def cache_directory() -> Path:
    """$QPALETTE_CACHE, or ~/.cache/qpalette."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "qpalette")
