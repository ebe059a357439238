"""The counts and lengths in a GGUF header, held against the bytes of the file before anything is built from them.

The gguf library takes them at their word, and makes several objects for each item of an array (700 bytes in all): an
array of 2^40 items in a file of 9 kB would keep it busy until the memory is full.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np
from gguf import GGUF_MAGIC, GGUFReader, GGUFValueType

from qpalette.core.errors import CheckpointError

MOST_ENTRIES = 1 << 16  # metadata, and tensors: the largest models have some thousand
MOST_DIMS = 4  # ggml's own
MOST_ITEMS = 1 << 21  # of all arrays: vocabularies of 262,144 tokens have 1.3 million; 1.5 GB while the file is open
WIDTHS = {int(kind): np.dtype(scalar).itemsize for kind, scalar in GGUFReader.gguf_scalar_to_np.items()}


def check_header(file: Path) -> None:
    """Raises CheckpointError when the header of `file` announces more than the file can hold, or a reader should."""
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).header()
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} is truncated or no valid GGUF file ({error}); fetch it again") from error


class _Walk:
    """Goes through a header without keeping any of it. Raises ValueError or struct.error where it cannot go on."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.order, self.at, self.items = data, "<", 0, 0

    def header(self) -> None:
        if self.number("I") != GGUF_MAGIC:
            raise ValueError("it does not begin with GGUF")
        if self.number("I") & 0xFFFF == 0:  # the version, which is small, in the other order of bytes
            self.order = ">"
        tensors, fields = self.number("Q"), self.number("Q")
        if max(tensors, fields) > MOST_ENTRIES:
            raise ValueError(f"it announces {tensors} tensors and {fields} metadata, and {MOST_ENTRIES} are the most")
        for _ in range(fields):
            self.string()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.tensor()

    def value(self, kind: int) -> None:
        if kind == GGUFValueType.STRING:
            self.string()
        elif kind == GGUFValueType.ARRAY:
            self.array(self.number("I"), self.number("Q"))
        else:
            self.skip(self.width(kind))

    def array(self, kind: int, count: int) -> None:
        self.items += count
        if self.items > MOST_ITEMS:
            raise ValueError(f"its arrays announce {self.items} items, and {MOST_ITEMS} are the most")
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                self.string()
        else:
            self.skip(count * self.width(kind))

    def tensor(self) -> None:
        self.string()
        dims = self.number("I")
        if dims > MOST_DIMS:
            raise ValueError(f"it announces a tensor of {dims} dimensions, and {MOST_DIMS} are the most")
        self.skip(8 * dims)
        self.number("I")  # its type
        self.number("Q")  # where its data begin

    def string(self) -> None:
        self.skip(self.number("Q"))

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += struct.calcsize(self.order + code)
        return int(value)

    def skip(self, count: int) -> None:
        left = len(self.data) - self.at
        if count > left:
            raise ValueError(f"at byte {self.at} it announces {count} bytes, and {left} are left")
        self.at += count

    def width(self, kind: int) -> int:
        if kind not in WIDTHS:
            raise ValueError(f"at byte {self.at} there is a value of the unknown type {kind}")
        return WIDTHS[kind]
