"""A call of a compiled kernel, before its operands have addresses."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from qpalette.backends.cpu.step.record import Memory, Operand


class Address(NamedTuple):
    """Of a compiled kernel, as a word."""

    kernel: Any


FAULT = object()  # the word that is the address of where a kernel says that it was given an index out of range


class Native(NamedTuple):
    """A call of `kernel` with these words: numbers, operands that stand for their addresses, Addresses, FAULT."""

    kernel: Any
    words: list[Any]

    @property
    def memories(self) -> list[Memory]:
        return [word.memory for word in self.words if isinstance(word, Operand)]

    @property
    def kernels(self) -> list[Any]:
        return [self.kernel, *(word.kernel for word in self.words if isinstance(word, Address))]


def bits_of(number: float) -> int:
    """A float64 as a word."""
    return struct.unpack("<q", struct.pack("<d", float(number)))[0]
