"""Writes any checkpoint as a plain Hugging Face directory: the 16-bit reference of a GGUF file, for one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from qpalette.checkpoint.base import Checkpoint, TensorInfo
from qpalette.checkpoint.safetensors_writer import StreamingSafetensorsWriter
from qpalette.core.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 2**30


def export_checkpoint(checkpoint: Checkpoint, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json, every tensor as it is read, and the tokenizer; one tensor in memory at a time.

    The directory must not exist, or be empty; it appears whole (a sibling is filled, then renamed) or not at all.
    Raises CheckpointError when it exists, and what reading the checkpoint raises.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose another directory or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        checkpoint.save_side_files(temporary)
        config = json.dumps(checkpoint.config, indent=2, ensure_ascii=False)
        (temporary / "config.json").write_text(config + "\n", encoding="utf-8")
        _write_weights(checkpoint, temporary, max_shard_bytes)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(checkpoint: Checkpoint, directory: Path, max_shard_bytes: int) -> None:
    shards = _split(checkpoint.tensors.values(), max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, infos in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with StreamingSafetensorsWriter(directory / name, infos, {"format": "pt"}) as writer:
            for info in infos:
                writer.write(info.name, checkpoint.read(info.name))
        weight_map |= {info.name: name for info in infos}
    if len(shards) > 1:
        index = {"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
