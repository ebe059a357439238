"""A cache of codes on a GPU: `kvcache.Stream` with compiled kernels, as operators that a CUDA graph may capture,
and that torch.compile calls as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpalette.backends.cuda import coded
from qpalette.backends.cuda.coded import MOST_DIM, MOST_ROWS, PIECE, Coded
from qpalette.kvcache import Stream, parse_code, with_exact
from qpalette.kvcache.vectors import BLOCK

LIBRARY = torch.library.Library("qpalette", "FRAGMENT")
LIBRARY.define(
    "cuda_cache_write(Tensor[] vectors, Tensor tokens, Tensor starts, Tensor(a!)[] memory, Tensor[] constants,"
    " str[] codes, bool[] unbiased, int length) -> ()"
)
LIBRARY.define(
    "cuda_cache_read(Tensor count, Tensor starts, Tensor[] memory, Tensor[] constants, str code, int length) -> Tensor"
)
LIBRARY.define(
    "cuda_cache_attend(Tensor query, Tensor mask, Tensor count, Tensor starts, float scale, Tensor(a!) arrived,"
    " Tensor[] keys, Tensor[] key_constants, str key_code, Tensor[] values, Tensor[] value_constants, str value_code,"
    " int length) -> Tensor"
)
FORWARD_T, INVERSE, INVERSE_T, MEAN, FEEDBACK_T, GAIN, POINTS, LOOKUPS = range(8)
MEMORIES, CONSTANTS = 4, 8  # of a stream


class CudaStream(Stream):
    """The bytes are those of the definition, but where rounding decides between two that are equally near. Attention is
    of float16 numbers, with sums in float32."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._constants = self._turned()  # now: kernels read them before what was started last has ended
        self._zeros = self._new_zeros()

    @property
    def is_fused(self) -> bool:
        """As `Stream.is_fused`."""
        fits = self.sinks.dtype in (torch.float16, torch.bfloat16) and self.format.dim <= MOST_DIM
        return fits and self.format.dim % BLOCK == 0

    def write(self, vectors: Tensor, tokens: Tensor, starts: Tensor) -> None:
        """As `Stream.write`; tokens that have no room are left out."""
        if self.is_fused:
            self._write([self], [vectors], tokens, starts)
        else:
            super().write(vectors, tokens, starts)

    def write_both(self, values: Stream, keys: Tensor, own: Tensor, tokens: Tensor, starts: Tensor) -> None:
        """As `Stream.write_both`, in one launch."""
        if isinstance(values, CudaStream) and self.is_fused and values.is_fused:
            self._write([self, values], [keys, own], tokens, starts)
        else:
            super().write_both(values, keys, own, tokens, starts)

    def _write(self, streams: list[CudaStream], vectors: list[Tensor], tokens: Tensor, starts: Tensor) -> None:
        states = [each.detach().to(self.sinks.dtype) for each in vectors]
        states = [each if each.stride(-1) == 1 else each.contiguous() for each in states]
        memory = [part for stream in streams for part in stream.memory]
        constants = [part for stream in streams for part in stream._constants]
        names, unbiased = [each.format.code.name for each in streams], [each.format.unbiased for each in streams]
        torch.ops.qpalette.cuda_cache_write(
            states, tokens.reshape(-1), starts, memory, constants, names, unbiased, self.length
        )

    def read(self, count: Tensor, starts: Tensor) -> Tensor:
        """As `Stream.read`."""
        if not self.is_fused:
            return super().read(count, starts)
        parts = ([*self.memory], self._constants, self.format.code.name)
        return torch.ops.qpalette.cuda_cache_read(count, starts, *parts, self.length)

    def attend(
        self, values: Stream, query: Tensor, mask: Tensor, count: Tensor, starts: Tensor, scale: float
    ) -> Tensor | None:
        """As `Stream.attend`."""
        assert isinstance(values, CudaStream)
        fits = query.dtype == self.sinks.dtype == values.sinks.dtype and query.shape[2] <= MOST_ROWS
        alike = query.shape[:2] == self.sinks.shape[:2] and query.shape[3] == self.format.dim
        watched = query.requires_grad and torch.is_grad_enabled()
        if not (fits and alike and self.is_fused and values.is_fused and self._takes(mask)) or watched:
            return None
        if query.stride(-1) != 1:
            query = query.contiguous()
        parts: list[list[Tensor] | str] = []
        for stream in (self, values):
            parts += [[*stream.memory], stream._constants, stream.format.code.name]
        given = (query, mask, count, starts, scale, self._arrived)
        return torch.ops.qpalette.cuda_cache_attend(*given, *parts, self.length)

    def _takes(self, mask: Tensor) -> bool:
        """One mask for all queries of a sequence."""
        alike = mask.ndim == 4 and mask.shape[1:] == (1, 1, self.length) and mask.shape[0] in (1, len(self.sinks))
        return alike and mask.dtype == torch.bool and mask.stride(3) == 1

    @property
    def _arrived(self) -> Tensor:
        """Zeros for each block of queries, which a launch leaves as zeros."""
        if len(self._zeros) < len(self.sinks):  # more sequences were chosen
            self._zeros = self._new_zeros()
        return self._zeros

    def _new_zeros(self) -> Tensor:
        shape = (*self.sinks.shape[:2], -(-MOST_ROWS // coded.COLUMNS))
        return torch.zeros(shape, dtype=torch.int32, device=self.sinks.device)

    def _turned(self) -> list[Tensor]:
        transform, device = self.transform, self.sinks.device
        feedback, gain = transform.shaping or (torch.empty(0, device=device),) * 2
        turned = [transform.matrix.mT, transform.inverse, transform.inverse.mT, transform.mean]
        shaping = [feedback.mT if feedback.ndim > 1 else feedback, gain]
        name = self.format.code.name
        tables = [coded.points_of(name, device), coded.lookups_of(name, device)]
        return [each.contiguous() for each in (*turned, *shaping, *tables)]


def _write(
    vectors: list[Tensor],
    tokens: Tensor,
    starts: Tensor,
    memory: list[Tensor],
    constants: list[Tensor],
    codes: list[str],
    unbiased: list[bool],
    length: int,
) -> None:
    (batch, heads, count), sinks, ring = vectors[0].shape[:3], memory[1], memory[2]
    vectors = [each if _is_aligned(each) else each.contiguous() for each in vectors]
    problem = coded.WriteProblem(
        tokens=tokens.data_ptr(),
        starts=starts.data_ptr(),
        batch=batch,
        heads=heads,
        count=count,
        length=length,
        sink_count=sinks.shape[2],
        window=ring.shape[2],
    )
    streams, what = [], []
    for at, each in enumerate(vectors):
        own = memory[MEMORIES * at : MEMORIES * (at + 1)]
        streams.append(_write_stream(each, own, constants[CONSTANTS * at : CONSTANTS * (at + 1)]))
        what.append(Coded(parse_code(codes[at]), each.shape[-1], unbiased[at]))
    plan = coded.plan_write(what, (batch, heads, count), vectors[0].dtype)
    coded.start_write(plan, streams, problem, vectors[0].device.index or 0)


def _is_aligned(vectors: Tensor) -> bool:
    """Whether each vector, of a multiple of 8 numbers, begins at one of 16 bytes."""
    strides = (stride for stride, size in zip(vectors.stride()[:3], vectors.shape[:3], strict=True) if size > 1)
    return vectors.data_ptr() % 16 == 0 and not any(stride % BLOCK for stride in strides)


def _write_stream(vectors: Tensor, memory: list[Tensor], constants: list[Tensor]) -> coded.WriteStream:
    pages, sinks, ring, ring_tokens = memory
    return coded.WriteStream(
        vectors=vectors.data_ptr(),
        vector_batch=vectors.stride(0),
        vector_head=vectors.stride(1),
        vector_token=vectors.stride(2),
        matrix=constants[FORWARD_T].data_ptr(),
        mean=constants[MEAN].data_ptr(),
        feedback=constants[FEEDBACK_T].data_ptr() if constants[FEEDBACK_T].numel() else None,
        gain=constants[GAIN].data_ptr(),
        points=constants[POINTS].data_ptr(),
        pages=pages.data_ptr(),
        sinks=sinks.data_ptr(),
        ring=ring.data_ptr(),
        ring_tokens=ring_tokens.data_ptr(),
        page_count=pages.shape[2],
        is_shared=int(len(constants[MEAN]) == 1),
    )


def _read(
    count: Tensor, starts: Tensor, memory: list[Tensor], constants: list[Tensor], code: str, length: int
) -> Tensor:
    pages, sinks = memory[:2]
    (batch, heads, _, dim), room = sinks.shape, pages.shape[2] * coded.PAGE
    dense = torch.zeros(batch, heads, room, dim, device=sinks.device)
    for first in range(0, length, PIECE):
        size = min(PIECE, length - first)
        coordinates = torch.empty(batch, heads, size, dim, device=sinks.device)
        problem = coded.ReadProblem(
            pages=pages.data_ptr(),
            points=constants[POINTS].data_ptr(),
            out=coordinates.data_ptr(),
            page_count=pages.shape[2],
            first=first,
            count=size,
        )
        coded.start_read(Coded(parse_code(code), dim, False), problem, batch * heads, sinks.device.index or 0)
        dense[:, :, first : first + size] = coordinates @ constants[INVERSE_T] + constants[MEAN][:, None]
    return with_exact(dense, memory[1:], count, starts)[:, :, :length]


def _attend(
    query: Tensor,
    mask: Tensor,
    count: Tensor,
    starts: Tensor,
    scale: float,
    arrived: Tensor,
    keys: list[Tensor],
    key_constants: list[Tensor],
    key_code: str,
    values: list[Tensor],
    value_constants: list[Tensor],
    value_code: str,
    length: int,
) -> Tensor:
    (batch, heads, rows, dim), value_dim = query.shape, values[1].shape[-1]
    device = query.device
    plan = coded.plan_attend(
        Coded(parse_code(key_code), dim, False),
        Coded(parse_code(value_code), value_dim, False),
        (batch, heads, rows),
        length,
        query.dtype,
        coded.limits_of(device),
    )
    out = query.new_empty(batch, heads, rows, value_dim)
    parts = torch.empty(plan.part_numbers, device=device)
    problem = coded.AttendProblem(
        keys=_attend_stream(keys, key_constants, INVERSE),
        values=_attend_stream(values, value_constants, INVERSE_T),
        query=query.data_ptr(),
        mask=mask.data_ptr(),
        count=count.data_ptr(),
        starts=starts.data_ptr(),
        out=out.data_ptr(),
        parts=parts.data_ptr(),
        arrived=arrived.data_ptr(),
        query_batch=query.stride(0),
        query_head=query.stride(1),
        query_row=query.stride(2),
        mask_batch=mask.stride(0) if mask.shape[0] > 1 else 0,
        heads=heads,
        rows=rows,
        length=length,
        sink_count=keys[1].shape[2],
        window=keys[2].shape[2],
        scale=coded.log2_scale(scale),
    )
    coded.start_attend(plan, problem, device.index or 0)
    return out


def _attend_stream(memory: list[Tensor], constants: list[Tensor], matrix: int) -> coded.AttendStream:
    pages, sinks, ring, ring_tokens = memory
    return coded.AttendStream(
        pages=pages.data_ptr(),
        sinks=sinks.data_ptr(),
        ring=ring.data_ptr(),
        ring_tokens=ring_tokens.data_ptr(),
        table=constants[LOOKUPS].data_ptr(),
        matrix=constants[matrix].data_ptr(),
        mean=constants[MEAN].data_ptr(),
        page_count=pages.shape[2],
        is_shared=int(len(constants[MEAN]) == 1),
    )


for name, implementation in (("write", _write), ("read", _read), ("attend", _attend)):
    LIBRARY.impl(f"cuda_cache_{name}", implementation, "CUDA")


@torch.library.register_fake("qpalette::cuda_cache_write", lib=LIBRARY)
def _written(*given: object) -> None:
    return None


@torch.library.register_fake("qpalette::cuda_cache_read", lib=LIBRARY)
def _read_shape(
    count: Tensor, starts: Tensor, memory: list[Tensor], constants: list[Tensor], code: str, length: int
) -> Tensor:
    (batch, heads, _, dim), room = memory[1].shape, memory[0].shape[2] * coded.PAGE
    return memory[1].new_empty(batch, heads, room, dim, dtype=torch.float32)[:, :, :length]


@torch.library.register_fake("qpalette::cuda_cache_attend", lib=LIBRARY)
def _attended_shape(query: Tensor, mask: Tensor, *given: object) -> Tensor:
    values = given[7]
    assert isinstance(values, (list, tuple))
    return query.new_empty(*query.shape[:3], values[1].shape[-1])
