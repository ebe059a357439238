"""Writes any checkpoint as a plain Hugging Face directory: the 16-bit reference of a GGUF file, for one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qpalette.core.errors import CheckpointError
from qpalette.core.files import contents, is_mount_point, move_contents
from qpalette.storage.base import Checkpoint, TensorInfo
from qpalette.storage.safetensors_writer import StreamingSafetensorsWriter, header_bytes

MAX_SHARD_BYTES = 2**30  # files enough for several threads to write, hash and load an 8B
METADATA = {"format": "pt"}


def export_checkpoint(
    checkpoint: Checkpoint, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES, threads: int = 1
) -> None:
    """Write config.json, every tensor as it is read, and the tokenizer; one tensor in memory for each of the `threads`,
    which write a file each (`held_bytes`). Several are for a checkpoint whose `read` may run in several at once.

    The directory must not exist, or be empty; it appears whole (a sibling is filled, then renamed) or not at all. A
    mount point cannot be renamed: a folder in it is filled, then all is moved up, config.json last. Raises
    CheckpointError when it exists, and what reading the checkpoint raises.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or contents(target)):
        raise CheckpointError(f"{target} exists already; choose another directory or remove it")
    is_volume = is_mount_point(target)
    temporary = (target if is_volume else target.parent) / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        checkpoint.save_side_files(temporary)
        (temporary / "config.json").write_text(_config_text(checkpoint), encoding="utf-8", newline="\n")
        _write_weights(checkpoint, temporary, max_shard_bytes, threads)
        if is_volume:
            move_contents(temporary, target)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exported_bytes(checkpoint: Checkpoint, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Size of config.json, weights and index as `export_checkpoint` writes them, from headers alone; what
    `save_side_files` adds is not counted."""
    shards = _split(checkpoint.tensors.values(), max_shard_bytes)
    names = _shard_names(len(shards))
    total = len(_config_text(checkpoint).encode())
    for infos in shards:
        total += header_bytes(infos, METADATA) + sum(info.nbytes for info in infos)
    if len(shards) > 1:
        weight_map = {info.name: name for name, infos in zip(names, shards, strict=True) for info in infos}
        total += len(_index_text(checkpoint, weight_map).encode())
    return total


def held_bytes(checkpoint: Checkpoint, threads: int, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Of tensors in memory at the same time while `export_checkpoint` writes, at most."""
    largest = (max(info.nbytes for info in infos) for infos in _split(checkpoint.tensors.values(), max_shard_bytes))
    return sum(sorted(largest)[-threads:])


def exported_names(checkpoint: Checkpoint, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[str]:
    """The files that `exported_bytes` counts."""
    shards = _shard_names(len(_split(checkpoint.tensors.values(), max_shard_bytes)))
    return ["config.json", *shards, *(["model.safetensors.index.json"] if len(shards) > 1 else [])]


def _config_text(checkpoint: Checkpoint) -> str:
    return json.dumps(checkpoint.config, indent=2, ensure_ascii=False) + "\n"


def _index_text(checkpoint: Checkpoint, weight_map: dict[str, str]) -> str:
    return json.dumps({"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": weight_map}, indent=2) + "\n"


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _write_weights(checkpoint: Checkpoint, directory: Path, max_shard_bytes: int, threads: int) -> None:
    shards = _split(checkpoint.tensors.values(), max_shard_bytes)
    names = _shard_names(len(shards))

    def write(name: str, infos: Iterable[TensorInfo]) -> None:
        with StreamingSafetensorsWriter(directory / name, infos, METADATA) as writer:
            for info in infos:
                writer.write(info.name, checkpoint.read(info.name))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, names, shards))
    if len(shards) > 1:
        weight_map = {info.name: name for name, infos in zip(names, shards, strict=True) for info in infos}
        index = directory / "model.safetensors.index.json"
        index.write_text(_index_text(checkpoint, weight_map), encoding="utf-8", newline="\n")


def _split(infos: Iterable[TensorInfo], max_shard_bytes: int) -> list[list[TensorInfo]]:
    """Consecutive runs of at most `max_shard_bytes`, one tensor at least."""
    shards: list[list[TensorInfo]] = []
    room = 0
    for info in infos:
        if not shards or info.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(info)
        room -= info.nbytes
    return shards
