"""What a checkpoint holds to the last bit, as one digest. Files are read once; their digests are remembered."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from qpalette.core.cache import private_folder
from qpalette.core.files import write_whole
from qpalette.storage.base import Checkpoint

BLOCK_BYTES = 1 << 26  # hashed by one thread
PIECE_BYTES = 1 << 20  # read at a time


def content_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights and of what says how they are read, wherever they lie and whatever their times. Side files
    are not of it: the Hub's cache has them only once somebody has asked for a tokenizer.

    A file's own digest is kept in the cache. It counts for as long as path, size, inode, and times of modification and
    change are what they were: the latter no program can set back.
    """
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        files = [(file.name, _digest_of(file, pool)) for file in checkpoint.files]
    return hashlib.sha256(json.dumps([checkpoint.fingerprint, files]).encode()).hexdigest()


def _digest_of(file: Path, pool: ThreadPoolExecutor) -> str:
    """Of the digests of its blocks."""
    real = file.resolve()
    status = real.stat()
    stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    known = private_folder("digests") / f"{hashlib.sha256(str(real).encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or half of one
        content = json.loads(known.read_text(encoding="utf-8"))
        if content["stamp"] == stamp:
            return str(content["blocks"])
    starts = range(0, status.st_size, BLOCK_BYTES)
    digest = hashlib.sha256(b"".join(pool.map(partial(_block_digest, real), starts))).hexdigest()
    with suppress(OSError):  # two processes that write the same
        write_whole(known, json.dumps({"stamp": stamp, "blocks": digest}))
    return digest


def _block_digest(file: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), BLOCK_BYTES
    with open(file, "rb") as stream:
        stream.seek(start)
        while left and (piece := stream.read(min(left, PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()
