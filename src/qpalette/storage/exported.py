"""Any checkpoint as a plain Hugging Face directory: its own, or a dequantized copy in a cache of bounded size."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from qpalette.core.cache import CACHE, code_digest, limit_bytes, mark_used, private_folder
from qpalette.core.errors import CheckpointError
from qpalette.storage.base import Checkpoint
from qpalette.storage.export import export_checkpoint

MAKERS = ("qpalette", "gguf", "transformers")  # whose releases decide what a copy holds


def plain_directory(checkpoint: Checkpoint) -> Path:
    """A Hugging Face directory with the weights of `checkpoint`: its own, or a dequantized copy in the cache.

    Copies that were not used for longest are removed while all together have more than $QPALETTE_CACHE_GB (50)
    gigabytes; this one stays. Raises CheckpointError when the cache cannot be written, InputError when that limit is
    no number.
    """
    if checkpoint.format == "safetensors":
        return checkpoint.files[0].parent
    limit = limit_bytes()
    try:
        directory = private_folder("exported") / _key(checkpoint.fingerprint)
        if not directory.exists():
            _export(checkpoint, directory)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or 'the cache'} cannot be written ({error.strerror}); set {CACHE} to a directory with "
            f"room for {checkpoint.total_bytes / 1e9:.1f} GB"
        ) from error
    mark_used(directory, limit)
    return directory


def _export(checkpoint: Checkpoint, directory: Path) -> None:
    try:
        export_checkpoint(checkpoint, directory)
    except (OSError, CheckpointError):
        if not directory.exists():  # otherwise another process has just written the same
            raise


def _key(fingerprint: str) -> str:
    """Of a model and of what exported it: a copy by other code may differ."""
    here = code_digest(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(repr((fingerprint, here, [version(maker) for maker in MAKERS])).encode()).hexdigest()
