"""A model quantized once, into the cache: what loading one with a rate in place of a quantized directory takes."""

from __future__ import annotations

import hashlib
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qpalette.core.cache import CACHE, code_digest, limit_bytes, mark_used, private_folder, remove
from qpalette.core.errors import ArtifactError, BusyError, CheckpointError
from qpalette.core.files import locked
from qpalette.formats import open_artifact
from qpalette.pipeline.api import quantize
from qpalette.pipeline.output import Output
from qpalette.pipeline.quantize import Progress
from qpalette.plan import profile_of
from qpalette.storage import Checkpoint
from qpalette.storage.content import content_digest

logger = logging.getLogger(__name__)


def quantized_copy(
    checkpoint: Checkpoint, *, device: str = "cpu", progress: Progress | None = None, **options: Any
) -> Path:
    """The directory of `checkpoint` quantized as `quantize` does it on `device` with `options`: data-free ones, of
    plain values. It is made by the first call, under $QPALETTE_CACHE.

    A copy belongs to a content (`content_digest`), to options and to the code that made it: another release makes
    another. Of two processes one works and the other waits; after one that was killed, the next goes on where it
    stopped. Copies that were not used for longest go while all have more than $QPALETTE_CACHE_GB (50) gigabytes.

    Raises as `quantize` does, and CheckpointError when the cache cannot be written.
    """
    limit = limit_bytes()
    try:
        directory = private_folder("quantized") / _key(checkpoint, device, options)
        while not _is_whole(directory):
            try:
                logger.info("%s is quantized into %s, once", checkpoint.location, directory)
                quantize(checkpoint.location, directory, device=device, progress=progress, **options)
            except BusyError as error:
                logger.warning("%s", error)
                with locked(Output(directory, False).work, directory, wait=True):
                    pass
            except ArtifactError:
                if not directory.exists():  # otherwise another process has just written the same
                    raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or 'the cache'} cannot be written ({error.strerror}); set {CACHE} to a directory with "
            "room for the quantized model"
        ) from error
    mark_used(directory, limit)
    return directory


def _key(checkpoint: Checkpoint, device: str, options: dict[str, Any]) -> str:
    profile = profile_of(options.get("target"), device)
    package = Path(__file__).parents[1]
    code = code_digest(file for pattern in ("*.py", "*.json") for file in package.rglob(pattern))
    what = [content_digest(checkpoint), options, None if profile is None else profile.device, code, version("qpalette")]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _is_whole(directory: Path) -> bool:
    """Whether it is there; one that is damaged is removed."""
    if not directory.exists():
        return False
    try:
        open_artifact(directory)
    except ArtifactError as error:
        logger.warning("%s: it is made again", error)
        remove(directory)
        return False
    return True
