"""What kernels are told of a stream of a cache of codes, and how a page of it is decoded.

A stream's words are part of those of every kernel that takes one (`coded_write.py`, `coded_attend.py`). A page is
decoded by one of three kernels of its code, called by address: to numbers, times queries, or into sums.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray

from qpalette.backends.cpu import instructions, simd
from qpalette.backends.cpu.jit import entry, inlined
from qpalette.backends.cpu.operands import TYPES, pointer
from qpalette.backends.cpu.step.kernels import words_at
from qpalette.backends.cpu.step.record import Operand
from qpalette.kvcache import PAGE, cache_palette, parse_code
from qpalette.kvcache.vectors import VectorFormat, planes, scales_of

LANES = simd.LANES
GROUP = LANES  # tokens that are decoded at once
LOOKED_UP = 2 * LANES  # entries that one instruction chooses from

# The words of a stream. Addresses of pages, how many a head has, bytes of one; of sinks, the ring and its tokens, and
# how many they are, and their type; of A^T, A^-1, its transpose and the mean, and whether all heads share them; of the
# feedback's transpose (0: none) and the gains; of the tables; then the format, the room, and of how many queries.
S_PAGES, S_PAGE_COUNT, S_PAGE_BYTES, S_SINKS, S_SINK_COUNT, S_RING, S_WINDOW, S_RING_TOKENS, S_TYPE = range(9)
S_FORWARD, S_INVERSE, S_INVERSE_T, S_MEAN, S_SHARED, S_FEEDBACK_T, S_GAIN = range(9, 16)
S_ENTRIES, S_POINTS, S_POINT_COUNT, S_SCALES = range(16, 20)
S_DIM, S_WIDTH, S_UNITS, S_CODE_BYTES, S_INDEX_BITS, S_UNBIASED, S_LENGTH, S_ROWS = range(20, 28)
S_WORDS = 28


class PageKernels(NamedTuple):
    """Of a code. Each is called with the stream's words, a page, memory to read or write, the result, and how many of
    the page's tokens. Coordinates of queries and sums are those of neighbours apart: [rows, width, padded units]."""

    decode: Any  # float32 [tokens, dim], in the stream's coordinates
    scores: Any  # from queries to float32 [rows, PAGE], products with each token; with others, up to a whole GROUP
    sums: Any  # from weights, float32 [rows, PAGE]: adds to sums the tokens times their weights


@lru_cache(maxsize=64)
def tables_of(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a code: its points by component, float32 [width, entries], padded with zeros for whole look-ups, and with
    infinities for whole vectors; and what each byte of scale stands for, float32 [256]."""
    code = parse_code(name)
    points = code.points(torch.device("cpu")).mT.contiguous()
    entries = torch.nn.functional.pad(points, (0, -points.shape[1] % LOOKED_UP))
    padded = torch.nn.functional.pad(points, (0, -points.shape[1] % LANES), value=float("inf"))
    return entries, padded, scales_of(torch.arange(256, dtype=torch.uint8))


def stream_words(memory: list[Operand], constants: list[Operand], code: str, unbiased: bool, length: int) -> list[Any]:
    """memory: of a Stream, in its order. constants: A^T, A^-1 and its transpose [heads or 1, dim, dim], which of values
    alone is read, the mean, the feedback's transpose and the gains, empty where there is none, then `tables_of`. All in
    one piece."""
    pages, sinks, ring, ring_tokens = memory
    forward, inverse, inverse_t, mean, feedback_t, gain, entries, points, scales = constants
    parsed, dim = parse_code(code), sinks.shape[-1]
    format = VectorFormat(parsed, dim, unbiased)
    words: list[Any] = [pages, pages.shape[2], pages.shape[3], sinks, sinks.shape[2]]
    words += [ring, ring.shape[2], ring_tokens, TYPES[sinks.dtype]]
    words += [forward, inverse, inverse_t, mean, int(forward.shape[0] == 1), feedback_t if feedback_t.numel else 0]
    words += [gain, entries, points, points.shape[1], scales, dim, parsed.width, format.units, format.code_bytes]
    return [*words, parsed.index_bits, int(unbiased), length, 0]


def kernels_of_pages(stream: list[Any]) -> PageKernels:
    """By a stream's words."""
    return page_kernels(stream[S_INDEX_BITS], stream[S_WIDTH])


def every_page_kernel() -> list[Any]:
    shapes = {(code.index_bits, code.width) for code in cache_palette()}
    return [kernel for shape in sorted(shapes) for kernel in page_kernels(*shape)]


@inlined
def padded(units):  # type: ignore[no-untyped-def]
    return (units + LANES - 1) // LANES * LANES


@lru_cache(maxsize=64)
def page_kernels(bits: int, width: int) -> PageKernels:
    """Sixteen indexes at a time. What is read of a vector's last ones may be beyond it: other codes, or scales."""
    has8, has4, has2, has1 = (plane in planes(bits) for plane in (8, 4, 2, 1))
    above4, above2 = 4 * has4, 4 * has4 + 2 * has2
    entries = max(1 << bits, LOOKED_UP)

    @inlined
    def indexes(codes, at, units, block):  # type: ignore[no-untyped-def]
        if has8:
            return simd.load_fields8(codes, at + block)
        index = simd.splati(np.int32(0))
        if has4:
            index = simd.load_fields4(codes, at + (block >> 1))
            at += (units + 1) >> 1
        if has2:
            fields = simd.load_fields2(codes, at + (block >> 2))
            index = simd.ori(index, simd.shli(fields, simd.splati(np.int32(above4))))
            at += (units + 3) >> 2
        if has1:
            fields = simd.load_fields1(codes, at + (block >> 3))
            index = simd.ori(index, simd.shli(fields, simd.splati(np.int32(above2))))
        return index

    @inlined
    def looked_up(table, at, index):  # type: ignore[no-untyped-def]
        if not instructions.HAS_AVX512:
            return simd.gatherf(table[at:], index)
        found = simd.lookup32(simd.loadf(table, at), simd.loadf(table, at + LANES), index)
        for part in range(1, entries // LOOKED_UP):
            start = at + part * LOOKED_UP
            other = simd.lookup32(simd.loadf(table, start), simd.loadf(table, start + LANES), index)
            above = simd.shri(index, simd.splati(np.int32(5)))
            found = simd.where_equal(above, simd.splati(np.int32(part)), other, found)
        return found

    @inlined
    def decode_some(codes, first, count, w, table, levels):  # type: ignore[no-untyped-def]
        """Entries of `count` tokens from `first` on, float32 [count, width, padded units]."""
        units, size, across = w[S_UNITS], w[S_CODE_BYTES], padded(w[S_UNITS])
        for token in range(count):
            for block in range(0, units, LANES):
                index, at = indexes(codes, (first + token) * size, units, block), token * width * across + block
                for component in range(width):
                    simd.store(levels, at + component * across, looked_up(table, component * entries, index))

    @inlined
    def memory_of(w, page):  # type: ignore[no-untyped-def]
        """A page, tables of entries and of scales, and levels of GROUP tokens."""
        return (
            carray(pointer(page), w[S_PAGE_BYTES], np.uint8),
            carray(pointer(w[S_ENTRIES]), width * entries, np.float32),
            carray(pointer(w[S_SCALES]), 256, np.float32),
            np.zeros(GROUP * width * padded(w[S_UNITS]), np.float32),
        )

    @entry(f"cache decode {bits} {width}")
    def decode(words, page, unused, out, tokens):  # type: ignore[no-untyped-def]
        w = words_at(words, S_WORDS)
        codes, table, scales, levels = memory_of(w, page)
        across, rows = padded(w[S_UNITS]), carray(pointer(out), (tokens, w[S_DIM]), np.float32)
        for token in range(tokens):
            decode_some(codes, token, 1, w, table, levels)
            scale = scales[codes[PAGE * w[S_CODE_BYTES] + token]]
            for i in range(w[S_DIM]):
                rows[token, i] = levels[i % width * across + i // width] * scale

    @entry(f"cache scores {bits} {width}")
    def scores(words, page, queries, out, tokens):  # type: ignore[no-untyped-def]
        w = words_at(words, S_WORDS)
        codes, table, scales, levels = memory_of(w, page)
        numbers = levels.size // GROUP
        x = carray(pointer(queries), w[S_ROWS] * numbers, np.float32)
        products = carray(pointer(out), w[S_ROWS] * PAGE, np.float32)
        own, quads = np.empty(GROUP, np.float32), np.empty(4 * LANES, np.float32)
        for first in range(0, tokens, GROUP):
            count = min(GROUP, tokens - first)
            decode_some(codes, first, count, w, table, levels)
            for token in range(count):
                own[token] = scales[codes[PAGE * w[S_CODE_BYTES] + first + token]]
            for row in range(w[S_ROWS]):
                for quad in range(4):
                    zero, at = simd.splatf(np.float32(0)), 4 * quad * numbers
                    a, b, c, d = zero, zero, zero, zero
                    for i in range(0, numbers, LANES):
                        q = simd.loadf(x, row * numbers + i)
                        a = simd.fmaf(q, simd.loadf(levels, at + i), a)
                        b = simd.fmaf(q, simd.loadf(levels, at + numbers + i), b)
                        c = simd.fmaf(q, simd.loadf(levels, at + 2 * numbers + i), c)
                        d = simd.fmaf(q, simd.loadf(levels, at + 3 * numbers + i), d)
                    simd.store(quads, quad * LANES, simd.quad_sums(a, b, c, d))
                a, b = simd.loadf(quads, 0), simd.loadf(quads, LANES)
                c, d = simd.loadf(quads, 2 * LANES), simd.loadf(quads, 3 * LANES)
                totals = simd.mulf(simd.quarter_sums(a, b, c, d), simd.loadf(own, 0))
                simd.store(products, row * PAGE + first, totals)

    @entry(f"cache sums {bits} {width}")
    def sums(words, page, weights, out, tokens):  # type: ignore[no-untyped-def]
        w = words_at(words, S_WORDS)
        codes, table, scales, levels = memory_of(w, page)
        numbers = levels.size // GROUP
        shares = carray(pointer(weights), (w[S_ROWS], PAGE), np.float32)
        totals, own = carray(pointer(out), w[S_ROWS] * numbers, np.float32), np.empty(GROUP, np.float32)
        for first in range(0, tokens, GROUP):
            count, used = min(GROUP, tokens - first), False
            for row in range(w[S_ROWS]):
                for token in range(first, first + count):
                    used |= shares[row, token] != 0
            if not used:
                continue
            decode_some(codes, first, count, w, table, levels)
            for row in range(w[S_ROWS]):
                own[:] = 0
                for token in range(count):
                    scale = scales[codes[PAGE * w[S_CODE_BYTES] + first + token]]
                    own[token] = shares[row, first + token] * scale
                for token in range(0, count, 4):
                    a, b = simd.load_splatf(own, token), simd.load_splatf(own, token + 1)
                    c, d = simd.load_splatf(own, token + 2), simd.load_splatf(own, token + 3)
                    for i in range(0, numbers, LANES):
                        at, total = token * numbers + i, simd.loadf(totals, row * numbers + i)
                        total = simd.fmaf(a, simd.loadf(levels, at), total)
                        total = simd.fmaf(b, simd.loadf(levels, at + numbers), total)
                        total = simd.fmaf(c, simd.loadf(levels, at + 2 * numbers), total)
                        total = simd.fmaf(d, simd.loadf(levels, at + 3 * numbers), total)
                        simd.store(totals, row * numbers + i, total)

    return PageKernels(decode, scores, sums)
