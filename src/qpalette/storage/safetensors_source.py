"""A Hugging Face directory: config.json beside one safetensors file or several, with or without an index."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import CheckpointError
from qpalette.storage.base import Checkpoint, layout_of
from qpalette.storage.safetensors_format import StoredTensor, read_header
from qpalette.storage.tied import with_own_head

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
BLOCK_BYTES = 1 << 24  # of two tensors at a time that are compared

# What a tokenizer, a chat template and a licence are kept in; of folders, only those that a tokenizer reads.
SIDE_FILES = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.codes"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
SIDE_FOLDERS = ("*template*", "*tokenizer*")
# Nor how a source is quantized, which the result is not.
NO_SIDE_FILES = (
    *("config.json", "*.index.json", "*.py", "*.safetensors"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
)
# Second copies of the weights in another naming, and weights on top of a model.
NOT_THE_MODEL = ("consolidated*.safetensors", "adapter_model*.safetensors")


class SafetensorsCheckpoint(Checkpoint):
    """Reads `directory`, tensors as they are stored; raises CheckpointError naming the file when anything in it is
    inconsistent. What the weights are stored as is `storage/quantized`'s to say.

    Weights may lie elsewhere, behind links: only numbers are taken from them. What is carried as text may not.
    """

    format = "safetensors"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _read_config(directory / "config.json")
        index = _find_index(directory)
        self.files = _shards_of_index(index) if index else _unindexed_files(directory)
        self._stored = _collect(self.files)
        if index:
            _check_index(index, self._stored)
        self.tensors = layout_of(stored.info for stored in self._stored.values())
        self.config = with_own_head(self.config, self.tensors, self._are_same)
        for extra in sorted(set(directory.glob("*.safetensors")) - set(self.files)):
            logger.warning("%s is not part of the model and is left out", extra)

    def read(self, name: str) -> torch.Tensor:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self.directory}: there is no tensor {name!r}; the names are those of its headers")
        return _read(stored, 0, stored.info.shape)

    def read_part(self, name: str, index: int) -> torch.Tensor:
        stored = self._stored[name]
        return _read(stored, index, stored.info.shape[1:])

    def save_side_files(self, directory: Path) -> None:
        copy_side_files(self.directory, directory)

    def _are_same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal, a block at a time: those that are not mostly differ in the first."""
        one, two = self.tensors[name], self.tensors[other]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        blocks = [_blocks(self._stored[tensor]) for tensor in (name, other)]
        return all(mine == theirs for mine, theirs in zip(*blocks, strict=True))


def copy_side_files(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Tokenizer, chat template, generation config and licence from one model directory to another, `but` some names.

    What a link brings in from elsewhere is no part of the model and is left out, with a warning (`is_inside`).
    """
    for file in side_files(source):
        place = file.relative_to(source)
        if str(place) not in but:
            (target / place).parent.mkdir(exist_ok=True)
            _copy_without_remote_code(file, target / place)


def side_files(directory: Path) -> list[Path]:
    """What `copy_side_files` copies from a model directory, in the order of names."""
    folders = [entry for entry in directory.iterdir() if entry.is_dir() and _matches(entry, SIDE_FOLDERS)]
    candidates = sorted(file for folder in (directory, *folders) for file in folder.iterdir() if _is_side_file(file))
    for file in candidates:
        if not is_inside(file, directory):
            logger.warning("%s is a link to %s, outside the model: it is left out; copy it there", file, file.resolve())
    return [file for file in candidates if is_inside(file, directory)]


def is_inside(file: Path, directory: Path) -> bool:
    """Whether `file`, its links followed, lies in `directory`, or where the Hub's cache keeps the files of a snapshot.

    That cache has models--owner--name/snapshots/REVISION/FILE, a link into models--owner--name/blobs.
    """
    real, home = file.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs"
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == blobs.resolve())


def _read(stored: StoredTensor, index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The `index`-th of equal parts of a tensor, each of `shape`."""
    buffer = torch.empty(math.prod(shape) * stored.info.dtype.itemsize, dtype=torch.uint8)
    with open(stored.file, "rb", buffering=0) as stream:
        stream.seek(stored.offset + index * buffer.nbytes)
        _fill(stream, buffer.numpy().data, f"{stored.file}: tensor {stored.info.name!r}")
    return buffer.view(stored.info.dtype).reshape(shape)


def _blocks(stored: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time."""
    left = stored.info.nbytes
    with open(stored.file, "rb") as stream:
        stream.seek(stored.offset)
        while block := stream.read(min(BLOCK_BYTES, left)):
            left -= len(block)
            yield block


def _fill(stream: Any, view: memoryview, what: str) -> None:
    """Read until the view is full; one system call returns 2 GiB at most."""
    position = 0
    while position < len(view):
        count = stream.readinto(view[position:])
        if not count:
            raise CheckpointError(f"{what} ends too early: the file changed since it was opened; open it again")
        position += count


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; fetch it again")
    return content


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; a model directory needs the config.json of its source")
    if not is_inside(file, file.parent):  # its content goes into the result
        raise CheckpointError(
            f"{file} is a link to {file.resolve()}, outside the model: copy it there, or give the directory it is in"
        )
    config = _read_json(file)
    if config.pop("auto_map", None):
        logger.warning("%s: auto_map dropped; remote code is never run", file)
    return config


def _find_index(directory: Path) -> Path | None:
    """The index to read by; None where the files are to be read without, as transformers does beside a whole file."""
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    standard = directory / "model.safetensors.index.json"
    if indexes and (directory / SINGLE).is_file():
        logger.warning(
            "%s: transformers reads this file, not %s: so it is what is read here", directory / SINGLE, indexes[0]
        )
        return None
    if len(indexes) > 1 and standard not in indexes:
        names = ", ".join(index.name for index in indexes)
        raise CheckpointError(f"{directory} has several indexes ({names}); keep the one to read")
    return standard if standard in indexes else next(iter(indexes), None)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no valid weight_map; fetch it again, or remove it to read every shard")
    return weight_map


def _shards_of_index(index: Path) -> tuple[Path, ...]:
    files = []
    for name in sorted(set(_weight_map(index).values())):
        file = index.parent / name
        if Path(name).name != name or file.suffix != ".safetensors":
            raise CheckpointError(f"{index} names {name!r}, which is no safetensors file beside it; fetch it again")
        if not file.is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is missing; fetch it")
        files.append(file)
    return tuple(files)


def _unindexed_files(directory: Path) -> tuple[Path, ...]:
    if (directory / SINGLE).is_file():
        return (directory / SINGLE,)
    return tuple(
        file
        for file in sorted(directory.glob("*.safetensors"))
        if not any(file.match(pattern) for pattern in NOT_THE_MODEL)
    )


def _collect(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of every file, those that the index forgot included."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            name = tensor.info.name
            if name in stored:
                raise CheckpointError(
                    f"tensor {name!r} is in two files, {stored[name].file} and {file}; remove the file that is stale"
                )
            stored[name] = tensor
    if not stored:
        raise CheckpointError(f"no tensor in {', '.join(map(str, files)) or 'the safetensors files'}; fetch them again")
    return stored


def _check_index(index: Path, stored: dict[str, StoredTensor]) -> None:
    for name, shard in _weight_map(index).items():
        if name not in stored or stored[name].file.name != shard:
            raise CheckpointError(
                f"{index} says that tensor {name!r} is in {shard}, but it is not; fetch both files again"
            )


def _is_side_file(file: Path) -> bool:
    return file.is_file() and _matches(file, SIDE_FILES) and not _matches(file, NO_SIDE_FILES)


def _matches(file: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(file.name, pattern) for pattern in patterns)


def _copy_without_remote_code(source: Path, target: Path) -> None:
    """Copy a file; a JSON one loses its auto_map, since the code that it names is not carried."""
    if source.suffix == ".json" and b'"auto_map"' in source.read_bytes():
        content = _read_json(source)
        if content.pop("auto_map", None):
            logger.warning("%s: auto_map dropped; remote code is never run", source)
            target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
            return
    shutil.copyfile(source, target)
