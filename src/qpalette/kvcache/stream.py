"""All keys, or all values, of one layer: pages of codes and scales, and the tokens that are kept exact.

Plain torch on any device, and the definition of what is stored. docs/cache.md describes the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpalette.kvcache.transform import Transform
from qpalette.kvcache.vectors import VectorFormat

PAGE = 64  # tokens of one head; a divisor of every server's block


@dataclass(frozen=True)
class Exact:
    """Tokens that stay as they are: the first `sinks` of a sequence, and the newest `window`."""

    sinks: int = 4
    window: int = 0


def pages_of(length: int, exact: Exact) -> int:
    """Of one head, with room for `length` tokens: one place more is for what must go nowhere, and sinks of a sequence
    that begins late may lie beyond."""
    return -(-(length + exact.sinks + 1) // PAGE)


class Stream:
    """Room for `length` tokens of `batch` sequences and `heads` heads, whose vectors are `format` after `transform`.

    pages: uint8 [batch, heads, pages, 64 * (code bytes + 1)]: the codes of 64 tokens, then their scales. Page i has the
    tokens 64 i and following. sinks: the model's type [batch, heads, sinks, dim]. ring: [batch, heads, window, dim],
    and ring_tokens, int64 [window], which token each place has, -1: none. Every token is coded at once, those in
    the ring too, so that a cache can be cut back.

    All methods change memory in place, or read it; addresses stay. `tokens`, int64 [n] or [], are on the device.
    A backend may have a class of its own with kernels, whose memory is the same.
    """

    def __init__(
        self,
        format: VectorFormat,
        transform: Transform,
        exact: Exact,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        batch, heads, self.length = shape
        self.format, self.transform, self.exact = format, transform.to(device), exact
        self.points = format.code.points(device)
        pages = pages_of(self.length, exact)
        self.pages = torch.zeros(batch, heads, pages, PAGE * (format.code_bytes + 1), dtype=torch.uint8, device=device)
        self.sinks = torch.zeros(batch, heads, exact.sinks, format.dim, dtype=dtype, device=device)
        self.ring = torch.zeros(batch, heads, exact.window, format.dim, dtype=dtype, device=device)
        self.ring_tokens = torch.full((exact.window,), -1, dtype=torch.int64, device=device)

    @property
    def is_fused(self) -> bool:
        """Whether it may `attend`."""
        return False

    @property
    def refuses(self) -> bool:
        """Whether `write` itself raises for tokens that have no room."""
        return False

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """Everything that is stored."""
        return self.pages, self.sinks, self.ring, self.ring_tokens

    @property
    def codes(self) -> Tensor:
        """uint8 [batch, heads, pages, 64, code bytes], the memory itself."""
        return self.pages[..., : PAGE * self.format.code_bytes].unflatten(-1, (PAGE, self.format.code_bytes))

    @property
    def scales(self) -> Tensor:
        """uint8 [batch, heads, pages, 64], the memory itself."""
        return self.pages[..., PAGE * self.format.code_bytes :]

    def write(self, vectors: Tensor, tokens: Tensor, starts: Tensor) -> None:
        """Keep `vectors` [batch, heads, n, dim] of successive `tokens`; starts [batch] is each sequence's first."""
        codes, scales = self.format.encode(self.transform.apply(vectors), self.points, self.transform.shaping)
        page, place = tokens // PAGE, tokens % PAGE
        self.codes[:, :, page, place] = codes
        self.scales[:, :, page, place] = scales
        if self.exact.sinks:
            self._keep_sinks(vectors, tokens, starts)
        if self.exact.window:
            newest = vectors[:, :, -self.exact.window :]
            places = tokens[-self.exact.window :]
            self.ring.index_copy_(2, places % self.exact.window, newest.to(self.ring.dtype))
            self.ring_tokens.index_copy_(0, places % self.exact.window, places)

    def write_both(self, values: Stream, keys: Tensor, own: Tensor, tokens: Tensor, starts: Tensor) -> None:
        """`write` of these `keys`, and of `own`, the values of the same tokens, to `values`."""
        self.write(keys, tokens, starts)
        values.write(own, tokens, starts)

    def read(self, count: Tensor, starts: Tensor) -> Tensor:
        """All `length` tokens, float32 [batch, heads, length, dim], of which the first `count` mean something."""
        dense = self.transform.undo(self.format.decode(self.codes, self.scales, self.points).flatten(2, 3))
        return with_exact(dense, self.memory[1:], count, starts)[:, :, : self.length]

    def attend(
        self, values: Stream, query: Tensor, mask: Tensor, count: Tensor, starts: Tensor, scale: float
    ) -> Tensor | None:
        """softmax(scale q k^T + mask) v, [batch, heads, rows, dim] like `query`, of the first `count` tokens of these
        keys and of `values`; mask: bool or float, broadcast to [batch, heads, rows, length]. None: reading both is
        the way to do it."""
        return None

    def _keep_sinks(self, vectors: Tensor, tokens: Tensor, starts: Tensor) -> None:
        index = sink_tokens(starts, self.exact.sinks) - tokens[0]
        here = (index >= 0) & (index < vectors.shape[2])
        index = index.clamp(0, vectors.shape[2] - 1)[:, None, :, None].expand_as(self.sinks)
        found = vectors.to(self.sinks.dtype).gather(2, index)
        self.sinks.copy_(torch.where(here[:, None, :, None], found, self.sinks))

    def cut(self, count: Tensor | int) -> None:
        """Only the first `count` tokens stay."""
        self.ring_tokens.masked_fill_(self.ring_tokens >= count, -1)

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes a copy of what sequences[i] was, int64 [n]. Only with n = batch do addresses stay."""
        for name in ("pages", "sinks", "ring"):
            memory = getattr(self, name)
            chosen = memory.index_select(0, sequences)
            setattr(self, name, memory.copy_(chosen) if chosen.shape == memory.shape else chosen)

    def copy(self, other: Stream, count: int) -> None:
        """The first `count` tokens of another stream of this kind, of any length."""
        pages = -(-count // PAGE)
        self.pages[:, :, :pages].copy_(other.pages[:, :, :pages])
        for mine, theirs in zip(self.memory[1:], other.memory[1:], strict=True):
            mine.copy_(theirs)
        self.cut(count)

    def clear(self) -> None:
        for memory in (self.pages, self.sinks, self.ring):
            memory.zero_()
        self.ring_tokens.fill_(-1)


def with_exact(dense: Tensor, exact: Sequence[Tensor], count: Tensor, starts: Tensor) -> Tensor:
    """`dense`, float32 [batch, heads, 64 pages, dim], with exact tokens in their places: a stream's sinks, ring and
    ring_tokens. What it had there is gone."""
    sinks, ring, ring_tokens = exact
    if sinks.shape[2]:
        places = sink_tokens(starts, sinks.shape[2])[:, None, :, None].expand_as(sinks)
        dense = dense.scatter_(2, places, sinks.float())
    if ring.shape[2]:
        kept = (ring_tokens >= count - ring.shape[2]) & (ring_tokens >= 0)
        nowhere = dense.shape[2] - 1
        dense = dense.index_copy_(2, torch.where(kept, ring_tokens, nowhere), ring.float())
    return dense


def sink_tokens(starts: Tensor, sinks: int) -> Tensor:
    """int64 [batch, sinks]: which tokens they are."""
    return starts[:, None] + torch.arange(sinks, device=starts.device)
