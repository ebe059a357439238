"""The one door to a source model: a directory, a GGUF file, or the name of a model on the Hub."""

from __future__ import annotations

import re
from copy import copy, deepcopy
from functools import lru_cache
from pathlib import Path

from qpalette.core.errors import CheckpointError
from qpalette.core.text import first_line
from qpalette.storage.base import Checkpoint, TensorInfo
from qpalette.storage.gguf_source import GgufCheckpoint
from qpalette.storage.quantized.checkpoint import as_plain
from qpalette.storage.safetensors_source import SIDE_FILES, SafetensorsCheckpoint

__all__ = ["Checkpoint", "TensorInfo", "local_path", "open_checkpoint"]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# With the card, its picture and SHA256SUMS a quantized model is whole: its checksums name its card and what that shows.
HUB_FILES = ["*.safetensors", *SIDE_FILES, "README.md", "qpalette_*.svg", "SHA256SUMS"]
# A pattern's * matches a slash, too: folders bring their small files, but no second copy of the weights.
HUB_IGNORED = ["consolidated*", "adapter_model*", "*.py", "*/*.safetensors"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Open a source model, reading headers only. Weights that are stored in a format of `storage/quantized` have
    their plain names and shapes, and are decoded when they are read.

    `path_or_id` is a directory with config.json and safetensors files, a .gguf file, a directory with exactly one,
    or a Hub id ("owner/name"), which is fetched first: weights, config and tokenizer, never code.

    Raises CheckpointError when there is no such model, when it holds pickles only (they are never loaded), when its
    weights are stored in a way that is not known exactly, and for every inconsistency of its files.
    """
    path = local_path(path_or_id)
    return _open_directory(path) if path.is_dir() else _open_file(path)


def local_path(path_or_id: str | Path) -> Path:
    """Where the model is on this machine, of whatever kind it is: the path itself, or the Hub id's, fetched first.

    Raises CheckpointError when there is neither.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    if isinstance(path_or_id, str) and HUB_ID.fullmatch(path_or_id) and path.suffix not in (".gguf", ".safetensors"):
        return _fetch(path_or_id)
    raise CheckpointError(f"{path} does not exist; give a model directory, a .gguf file or a Hub id (owner/name)")


def _open_directory(directory: Path) -> Checkpoint:
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.safetensors.index.json")):
        return as_plain(SafetensorsCheckpoint(directory))
    ggufs = sorted(directory.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        raise CheckpointError(f"{directory} has several GGUF files; name one: {', '.join(file.name for file in ggufs)}")
    if any(file for pattern in PICKLES for file in directory.glob(pattern)):
        raise _pickle_error(directory)
    raise CheckpointError(f"{directory} has no model: neither safetensors files nor a .gguf file")


def _open_file(file: Path) -> Checkpoint:
    if file.suffix == ".gguf":
        return _open_gguf(file)
    if any(file.match(pattern) for pattern in PICKLES):
        raise _pickle_error(file)
    raise CheckpointError(f"{file} is no GGUF file; for safetensors give the directory that holds config.json")


def _open_gguf(file: Path) -> Checkpoint:
    """Its metadata are read once in a process: a large vocabulary takes seconds, and a run opens its source several
    times. Whoever changes the config changes a copy. A file is the same for as long as `content_digest` says so."""
    found = file.stat()
    opened = copy(_gguf_as_it_is(file, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    opened.config = deepcopy(opened.config)
    return opened


@lru_cache(maxsize=4)
def _gguf_as_it_is(file: Path, inode: int, size: int, modified: int, changed: int) -> GgufCheckpoint:
    return GgufCheckpoint(file)


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} has pickle weights only, and no pickle is ever loaded; convert it to safetensors "
        "(save_pretrained does) and give that directory"
    )


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{hub_id!r} is no local path, and the Hub did not give it ({reason}); "
            "check the name, the network and your access, or download it and give the directory"
        ) from error
