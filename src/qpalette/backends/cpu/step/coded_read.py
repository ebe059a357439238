"""A stream's tokens as numbers, in its coordinates."""

from __future__ import annotations

from typing import Any

from qpalette.backends.cpu.calls import call
from qpalette.backends.cpu.jit import entry
from qpalette.backends.cpu.step import coded
from qpalette.backends.cpu.step.kernels import run_spread, spread, words_at
from qpalette.backends.cpu.step.native import Address, Native
from qpalette.backends.cpu.step.record import Operand
from qpalette.kvcache import PAGE

LEAST_PAGES = 4  # per thread

# The words of a read: those of the stream, how many heads there are in all, tokens, the address of the result, and the
# kernels: of `run_spread`, then what decodes a page.
R_HEADS, R_TOKENS, R_RESULT, R_PARTS = range(coded.S_WORDS, coded.S_WORDS + 4)
R_DECODE = R_PARTS + 2
R_WORDS = R_DECODE + 1


def read_call(stream: list[Any], result: Operand) -> Native:
    """The first tokens of each head: result float32 [batch, heads, tokens, dim], in one piece."""
    batch, heads, tokens, _ = result.shape
    parts = map(Address, (spread, read_some, coded.kernels_of_pages(stream).decode))
    return Native(read, [*stream, batch * heads, tokens, result, *parts])


@entry("cache read some")
def read_some(address, unused_a, worker, workers, unused_b):  # type: ignore[no-untyped-def]
    """Every `workers`-th page."""
    w = words_at(address, R_WORDS)
    tokens = w[R_TOKENS]
    pages = (tokens + PAGE - 1) // PAGE
    for item in range(worker, w[R_HEADS] * pages, workers):
        head, page = item // pages, item % pages
        source = w[coded.S_PAGES] + (head * w[coded.S_PAGE_COUNT] + page) * w[coded.S_PAGE_BYTES]
        into = w[R_RESULT] + 4 * (head * tokens + page * PAGE) * w[coded.S_DIM]
        call(w[R_DECODE], address, source, 0, into, min(PAGE, tokens - page * PAGE))


@entry("cache read")
def read(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
    w = words_at(address, R_WORDS)
    pages = w[R_HEADS] * (w[R_TOKENS] + PAGE - 1) // PAGE
    run_spread(w[R_PARTS:], 1, address, 0, min(threads, pages // LEAST_PAGES))
