"""The safetensors header: 8 bytes of length, JSON, then every tensor's bytes without a gap."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import CheckpointError
from qpalette.storage.base import TensorInfo

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie: `info.nbytes` of them at `offset` from the start of `file`."""

    info: TensorInfo
    file: Path
    offset: int


def read_header(file: Path) -> list[StoredTensor]:
    """Every tensor of a safetensors file, by offset.

    Raises CheckpointError when the file is truncated, has bytes that no tensor owns, or an invalid header.
    """
    size = file.stat().st_size
    header, data_start = _read_json(file, size)
    entries = [_entry(file, name, value) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry[1:])
    position = 0
    for info, start, end in entries:
        if start != position or end - start != info.nbytes:
            raise CheckpointError(
                f"{file}: tensor {info.name!r} claims bytes {start} to {end}, but {position} to "
                f"{position + info.nbytes} are expected; the header is corrupt, fetch the file again"
            )
        position = end
    if data_start + position > size:
        raise CheckpointError(
            f"{file} is truncated: its header announces {data_start + position} bytes, the file has {size}; "
            "fetch it again"
        )
    if data_start + position < size:
        raise CheckpointError(
            f"{file}: {size - data_start - position} bytes after the last tensor belong to no tensor; "
            "the file is corrupt, fetch it again"
        )
    return [StoredTensor(info, file, data_start + start) for info, start, _ in entries]


def _read_json(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header as a dict, and the position of the first tensor byte."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: the header length ({length} bytes) goes beyond the file ({size} bytes); "
                "it is truncated or no safetensors file, fetch it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is no valid JSON ({error}); fetch the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is no JSON object; fetch the file again")
    return header, 8 + length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key repeat, and the last one wins: a tensor would vanish."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(file: Path, name: str, value: Any) -> tuple[TensorInfo, int, int]:
    """(info, first byte, end) of one header entry, every field checked."""
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: the header entry of tensor {name!r} is malformed; fetch the file again") from (
            error
        )
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(
            f"{file}: tensor {name!r} has a shape or offset that is no natural number; fetch the file again"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {dtype!r}, which is not supported ({', '.join(DTYPES)}); "
            "convert the checkpoint to 16-bit floats first"
        )
    return TensorInfo(name, tuple(shape), DTYPES[dtype]), start, end
