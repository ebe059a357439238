"""A cache of codes on a CPU: `kvcache.Stream` with compiled kernels, as operators that a program can have recorded,
and that torch.compile calls as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpalette.backends.cpu.calls import address_of
from qpalette.backends.cpu.operands import TYPES
from qpalette.backends.cpu.step.coded import stream_words, tables_of
from qpalette.backends.cpu.step.coded_attend import attend_call
from qpalette.backends.cpu.step.coded_read import read_call
from qpalette.backends.cpu.step.coded_write import write_call
from qpalette.backends.cpu.step.native import FAULT, Address, Native, bits_of
from qpalette.backends.cpu.step.record import Memory, Operand
from qpalette.backends.cpu.threads import one_caller, present_threads
from qpalette.core.errors import InputError
from qpalette.kvcache import PAGE, Stream, with_exact

MOST_ROWS = 64  # queries of a head that codes are decoded for at once
FORWARD_T, INVERSE, INVERSE_T, MEAN = range(4)  # of a stream's constants

LIBRARY = torch.library.Library("qpalette", "FRAGMENT")
LIBRARY.define(
    "cpu_cache_write(Tensor vectors, Tensor tokens, Tensor starts, Tensor(a!)[] memory, Tensor[] constants, str code,"
    " bool unbiased, int length) -> ()"
)
LIBRARY.define(
    "cpu_cache_read(Tensor count, Tensor starts, Tensor[] memory, Tensor[] constants, str code, bool unbiased,"
    " int length) -> Tensor"
)
LIBRARY.define(
    "cpu_cache_attend(Tensor query, Tensor mask, Tensor count, Tensor starts, float scale,"
    " Tensor[] keys, Tensor[] key_constants, str key_code, bool key_unbiased,"
    " Tensor[] values, Tensor[] value_constants, str value_code, bool value_unbiased, int length) -> Tensor"
)


_Parts = tuple[list[Tensor], list[Tensor], str, bool]  # memory, constants, code, whether it is unbiased


class CpuStream(Stream):
    """The bytes are those of the definition, but where rounding decides between two that are equally near."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._constants = self._turned()

    @property
    def is_fused(self) -> bool:
        """As `Stream.is_fused`."""
        return self.sinks.dtype in TYPES

    @property
    def refuses(self) -> bool:
        """As `Stream.refuses`."""
        return self.is_fused

    def write(self, vectors: Tensor, tokens: Tensor, starts: Tensor) -> None:
        """As `Stream.write`. Raises InputError where there is no room."""
        if not self.is_fused:
            super().write(vectors, tokens, starts)
            return
        states = vectors.detach().to(self.sinks.dtype)
        if states.stride(-1) != 1:
            states = states.contiguous()
        torch.ops.qpalette.cpu_cache_write(states, tokens, starts, *self._parts, self.length)

    def read(self, count: Tensor, starts: Tensor) -> Tensor:
        """As `Stream.read`; zeros where there are no tokens."""
        if not self.is_fused:
            return super().read(count, starts)
        return torch.ops.qpalette.cpu_cache_read(count, starts, *self._parts, self.length)

    def attend(
        self, values: Stream, query: Tensor, mask: Tensor, count: Tensor, starts: Tensor, scale: float
    ) -> Tensor | None:
        """As `Stream.attend`."""
        assert isinstance(values, CpuStream)
        fits = query.dtype == self.sinks.dtype == values.sinks.dtype and query.shape[2] <= MOST_ROWS
        alike = query.shape[:2] == self.sinks.shape[:2] and query.shape[3] == self.format.dim
        if not (fits and alike and self._takes(mask, query.shape)) or _is_watched(query):
            return None
        if query.stride(-1) != 1:
            query = query.contiguous()
        parts = (*self._parts, *values._parts_of_values)
        return torch.ops.qpalette.cpu_cache_attend(query, mask, count, starts, scale, *parts, self.length)

    def _takes(self, mask: Tensor, shape: torch.Size) -> bool:
        sizes = zip(mask.shape[:3], shape[:3], strict=True) if mask.ndim == 4 else [(0, 1)]
        broadcasts = all(size in (1, wanted) for size, wanted in sizes)
        return broadcasts and mask.shape[3] == self.length and mask.dtype in (torch.bool, *TYPES)

    @property
    def _parts(self) -> _Parts:
        return [*self.memory], self._constants, self.format.code.name, self.format.unbiased

    @property
    def _parts_of_values(self) -> _Parts:
        """With A^-T, which turns sums of values back."""
        memory, constants, code, unbiased = self._parts
        if constants[INVERSE_T].numel() == 0:
            back = self.transform.inverse.mT.contiguous()
            constants = [*constants[:INVERSE_T], back, *constants[INVERSE_T + 1 :]]
        return memory, constants, code, unbiased

    def _turned(self) -> list[Tensor]:
        """A^-T only where all heads share it, as those of a cache's values do: nothing reads that of keys."""
        transform, nothing = self.transform, torch.empty(0)
        feedback, gain = (nothing, nothing) if transform.shaping is None else transform.shaping
        back = transform.inverse.mT if len(transform.inverse) == 1 else nothing
        turned = [transform.matrix.mT, transform.inverse, back, transform.mean]
        shaping = [feedback.mT if feedback.ndim > 1 else feedback, gain]
        return [*(each.contiguous() for each in (*turned, *shaping)), *tables_of(self.format.code.name)]


def _is_watched(query: Tensor) -> bool:
    """Whether a gradient is wanted, which kernels do not give."""
    return query.requires_grad and torch.is_grad_enabled()


def _write(vectors: Tensor, tokens: Tensor, starts: Tensor, *stream: Any) -> None:
    length = stream[-1]
    if (needed := int(tokens[-1]) + 1) > length:
        raise InputError(f"the cache has room for {length} tokens, not for {needed}: make it longer")
    _run(write_call(_words(*stream), *map(_operand, (vectors, tokens, starts))))


def _read(count: Tensor, starts: Tensor, memory: list[Tensor], constants: list[Tensor], *rest: Any) -> Tensor:
    pages, sinks, length = memory[0], memory[1], rest[-1]
    (batch, heads, _, dim), tokens = sinks.shape, min(int(count), length)
    dense = torch.zeros(batch, heads, pages.shape[2] * PAGE, dim)
    if tokens:
        coordinates = torch.empty(batch, heads, tokens, dim)
        _run(read_call(_words(memory, constants, *rest), _operand(coordinates)))
        dense[:, :, :tokens] = coordinates @ constants[INVERSE].mT + constants[MEAN][:, None]
    return with_exact(dense, memory[1:], count, starts)[:, :, :length].contiguous()


def _attend(query: Tensor, mask: Tensor, count: Tensor, starts: Tensor, scale: float, *streams: Any) -> Tensor:
    *parts, length = streams
    keys, values = _words(*parts[:4], length), _words(*parts[4:], length)
    result = query.new_empty(*query.shape[:3], parts[4][1].shape[-1])
    _run(attend_call(keys, values, [*map(_operand, (query, mask, count, starts, result))], bits_of(scale)))
    return result


for name, implementation in (("write", _write), ("read", _read), ("attend", _attend)):
    LIBRARY.impl(f"cpu_cache_{name}", implementation, "CPU")


@torch.library.register_fake("qpalette::cpu_cache_write", lib=LIBRARY)
def _written(*given: object) -> None:
    return None


@torch.library.register_fake("qpalette::cpu_cache_read", lib=LIBRARY)
def _read_shape(count: Tensor, starts: Tensor, memory: list[Tensor], constants: list[Tensor], *rest: Any) -> Tensor:
    batch, heads, _, dim = memory[1].shape
    return memory[1].new_empty(batch, heads, rest[-1], dim, dtype=torch.float32)


@torch.library.register_fake("qpalette::cpu_cache_attend", lib=LIBRARY)
def _attended_shape(query: Tensor, mask: Tensor, count: Tensor, starts: Tensor, scale: float, *streams: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], streams[4][1].shape[-1])


def _words(memory: list[Tensor], constants: list[Tensor], *rest: Any) -> list[Any]:
    return stream_words([*map(_operand, memory)], [*map(_operand, constants)], *rest)


def _operand(tensor: Tensor) -> Operand:
    """In memory of its own, which is there."""
    offset = int(tensor.storage_offset())
    return Operand(Memory(0, tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)


def _run(native: Native) -> None:
    """Now, on memory that is there."""
    fault = np.zeros(1, np.int64)

    def word(each: Any) -> int:
        if isinstance(each, Operand):
            assert each.memory.kept is not None
            return each.memory.kept.data_ptr()
        if isinstance(each, Address):
            return address_of(each.kernel)
        return fault.ctypes.data if each is FAULT else each

    words = np.array([word(each) for each in native.words], np.int64)
    threads = present_threads()
    with one_caller:
        native.kernel(words.ctypes.data, 0, 0, 0, threads)
    assert not fault[0]
