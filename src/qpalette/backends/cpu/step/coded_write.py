"""New tokens of a stream of a cache of codes: transformed, coded and stored, each alone; the definition is
`kvcache.Stream.write`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import entry, inlined, kernel
from qpalette.backends.cpu.operands import address_after, pointer, read_values, write_values
from qpalette.backends.cpu.step import coded
from qpalette.backends.cpu.step.kernels import run_spread, spread, total_of, words_at
from qpalette.backends.cpu.step.native import FAULT, Address, Native
from qpalette.backends.cpu.step.record import Operand
from qpalette.kvcache import PAGE
from qpalette.kvcache.vectors import BLOCK, SCALE_ONE, SCALE_STEPS

LANES = simd.LANES
LEAST_VECTORS = 16  # per thread
TINY = np.finfo(np.float32).tiny

# The words of a write: those of the stream, then batch, heads and tokens; address and strides of the vectors, but for
# the last, 1; of the tokens' numbers and each sequence's first; where to say that there is no room; the kernels of
# `run_spread`.
W_SHAPE, W_VECTORS, W_TOKENS, W_STARTS, W_FAULT, W_PARTS = (coded.S_WORDS + place for place in (0, 3, 7, 8, 9, 10))
W_WORDS = W_PARTS + 2


def write_call(stream: list[Any], vectors: Operand, tokens: Operand, starts: Operand) -> Native:
    """vectors: [batch, heads, n, dim], of the stream's type, numbers of a vector behind each other; tokens: int64 [n],
    successive; starts: int64 [batch]."""
    words = [*stream, *vectors.shape[:3], vectors, *vectors.strides[:3], tokens, starts, FAULT]
    return Native(write, [*words, Address(spread), Address(write_some)])


@inlined
def add_row(matrix, at, size, factor, out):  # type: ignore[no-untyped-def]
    """out += factor times `size` elements of `matrix` from `at` on."""
    whole, lanes = size // LANES * LANES, simd.splatf(factor)
    for i in range(0, whole, LANES):
        simd.store(out, i, simd.fmaf(lanes, simd.loadf(matrix, at + i), simd.loadf(out, i)))
    for i in range(whole, size):
        out[i] += factor * matrix[at + i]


@kernel
def multiply_rows(vector, matrix, at, out):  # type: ignore[no-untyped-def]
    """out = the sum of vector[j] times row j of the square matrix whose elements begin at matrix[at]."""
    size = vector.size
    whole, fours, zero = size // LANES * LANES, size // 4 * 4, simd.splatf(np.float32(0))
    for start in range(0, whole, LANES):
        a, b, c, d, place = zero, zero, zero, zero, at + start
        for j in range(0, fours, 4):
            a = simd.fmaf(simd.load_splatf(vector, j), simd.loadf(matrix, place), a)
            b = simd.fmaf(simd.load_splatf(vector, j + 1), simd.loadf(matrix, place + size), b)
            c = simd.fmaf(simd.load_splatf(vector, j + 2), simd.loadf(matrix, place + 2 * size), c)
            d = simd.fmaf(simd.load_splatf(vector, j + 3), simd.loadf(matrix, place + 3 * size), d)
            place += 4 * size
        for j in range(fours, size):
            a = simd.fmaf(simd.load_splatf(vector, j), simd.loadf(matrix, at + j * size + start), a)
        simd.store(out, start, simd.addf(simd.addf(a, b), simd.addf(c, d)))
    for i in range(whole, size):
        total = np.float32(0)
        for j in range(size):
            total += vector[j] * matrix[at + j * size + i]
        out[i] = total


@inlined
def nearest(points, count, width, values, at, lanes):  # type: ignore[no-untyped-def]
    """Which of `count` points, float32 [width, count], is nearest to values[at : at + width]: the first of equals, and
    of what is not a number. lanes: 0, 1, .., LANES - 1."""
    lowest, where = simd.splatf(np.float32(np.inf)), simd.loadi(lanes, 0)
    for start in range(0, count, LANES):
        apart = simd.subf(simd.splatf(values[at]), simd.loadf(points, start))
        distance = simd.mulf(apart, apart)
        for component in range(1, width):
            apart = simd.subf(simd.splatf(values[at + component]), simd.loadf(points, component * count + start))
            distance = simd.addf(distance, simd.mulf(apart, apart))
        here = simd.addi(simd.loadi(lanes, 0), simd.splati(np.int32(start)))
        where = simd.where_lessi(distance, lowest, here, where)
        lowest = simd.where_lessf(distance, lowest, distance, lowest)
    return simd.place_of_least(lowest, where)


@kernel
def scale_byte(scale):  # type: ignore[no-untyped-def]
    """As `kvcache.vectors.scale_bytes`."""
    if not np.isfinite(scale) or scale <= 0:
        return np.uint8(0)
    exponent = np.rint(np.log2(scale) * np.float32(SCALE_STEPS)) + SCALE_ONE
    return np.uint8(min(max(exponent, 0), 255))


@kernel
def store_indexes(indexes, bits, codes, at):  # type: ignore[no-untyped-def]
    """As `kvcache.vectors.pack`."""
    shift, width = 0, 8
    while width:
        if bits & width:
            per_byte, mask = 8 // width, (1 << width) - 1
            for first in range(0, indexes.size, per_byte):
                packed = 0
                for i in range(first, min(first + per_byte, indexes.size)):
                    packed |= (indexes[i] >> shift & mask) << (i - first) * width
                codes[at] = packed
                at += 1
            shift += width
        width >>= 1


@kernel
def code_plain(w, points, y, wanted, indexes, lanes):  # type: ignore[no-untyped-def]
    """Fills `indexes`; the byte of scale. `wanted` is memory, like y."""
    dim, width, count = y.size, w[coded.S_WIDTH], w[coded.S_POINT_COUNT]
    for i in range(dim):
        wanted[i] = y[i] * y[i]
    square = total_of(wanted)
    root = np.sqrt(square / np.float32(dim))
    divisor = TINY if root < TINY else root
    for i in range(dim):
        wanted[i] = y[i] / divisor
    cross, of_levels = np.float32(0), np.float32(0)
    for unit in range(indexes.size):
        index = nearest(points, count, width, wanted, unit * width, lanes)
        indexes[unit] = index
        for component in range(width):
            level = points[component * count + index]
            cross += y[unit * width + component] * level
            of_levels += level * level
    return scale_byte(square / cross if w[coded.S_UNBIASED] else cross / of_levels)


@kernel
def code_shaped(w, points, head, y, wanted, indexes, lanes):  # type: ignore[no-untyped-def]
    """The same with errors fed back; y becomes them."""
    dim, width, count = y.size, w[coded.S_WIDTH], w[coded.S_POINT_COUNT]
    feedback = carray(pointer(w[coded.S_FEEDBACK_T] + 4 * head * dim * dim), dim * dim, np.float32)
    gain = carray(pointer(w[coded.S_GAIN]), head + 1, np.float32)[head]
    for i in range(dim):
        wanted[i] = y[i] * y[i]
    byte = scale_byte(np.sqrt(total_of(wanted) / np.float32(dim)) * gain)
    scale = carray(pointer(w[coded.S_SCALES]), 256, np.float32)[byte]
    divisor, carried = scale if scale != 0 else np.float32(1), np.zeros(dim, np.float32)
    for start in range(0, dim, BLOCK):
        after = start + BLOCK
        for i in range(start, after):
            wanted[i] = (y[i] + carried[i]) / divisor
        for unit in range(start // width, after // width):
            index = nearest(points, count, width, wanted, unit * width, lanes)
            indexes[unit] = index
            for component in range(width):
                y[unit * width + component] -= points[component * count + index] * scale
        for i in range(start, after):
            add_row(feedback, i * dim + after, dim - after, y[i], carried[after:])
    return byte


@kernel
def keep_exact(w, x, at_head, token, place, is_new):  # type: ignore[no-untyped-def]
    sinks, window, type_ = w[coded.S_SINK_COUNT], w[coded.S_WINDOW], w[coded.S_TYPE]
    if 0 <= place < sinks:
        write_values(x, type_, address_after(w[coded.S_SINKS], (at_head * sinks + place) * x.size, type_))
    if is_new:
        ring = (at_head * window + token % window) * x.size
        write_values(x, type_, address_after(w[coded.S_RING], ring, type_))


@entry("cache write some")
def write_some(address, unused_a, worker, workers, unused_b):  # type: ignore[no-untyped-def]
    """Every `workers`-th vector."""
    w = words_at(address, W_WORDS)
    dim, type_, size = w[coded.S_DIM], w[coded.S_TYPE], w[coded.S_CODE_BYTES]
    heads, count, is_shared = w[W_SHAPE + 1], w[W_SHAPE + 2], w[coded.S_SHARED]
    first = carray(pointer(w[W_TOKENS]), 1, np.int64)[0]
    starts = carray(pointer(w[W_STARTS]), w[W_SHAPE], np.int64)
    points = carray(pointer(w[coded.S_POINTS]), w[coded.S_WIDTH] * w[coded.S_POINT_COUNT], np.float32)
    forward = carray(pointer(w[coded.S_FORWARD]), (1 if is_shared else heads) * dim * dim, np.float32)
    means = carray(pointer(w[coded.S_MEAN]), (1 if is_shared else heads) * dim, np.float32)
    x, y, wanted = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
    indexes, lanes = np.empty(w[coded.S_UNITS], np.int32), np.arange(LANES).astype(np.int32)
    for item in range(worker, w[W_SHAPE] * heads * count, workers):
        at_head, offset = item // count, item % count
        batch, head, token = at_head // heads, at_head % heads, first + offset
        place = batch * w[W_VECTORS + 1] + head * w[W_VECTORS + 2] + offset * w[W_VECTORS + 3]
        read_values(address_after(w[W_VECTORS], place, type_), type_, x)
        keep_exact(w, x, at_head, token, token - starts[batch], offset >= count - w[coded.S_WINDOW])
        own = 0 if is_shared else head
        for i in range(dim):
            x[i] -= means[own * dim + i]
        multiply_rows(x, forward, own * dim * dim, y)
        if w[coded.S_FEEDBACK_T]:
            byte = code_shaped(w, points, head, y, wanted, indexes, lanes)
        else:
            byte = code_plain(w, points, y, wanted, indexes, lanes)
        page = (at_head * w[coded.S_PAGE_COUNT] + token // PAGE) * w[coded.S_PAGE_BYTES]
        stored = carray(pointer(w[coded.S_PAGES] + page), w[coded.S_PAGE_BYTES], np.uint8)
        store_indexes(indexes, w[coded.S_INDEX_BITS], stored, token % PAGE * size)
        stored[PAGE * size + token % PAGE] = byte


@entry("cache write")
def write(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
    w = words_at(address, W_WORDS)
    count, window = w[W_SHAPE + 2], w[coded.S_WINDOW]
    first = carray(pointer(w[W_TOKENS]), 1, np.int64)[0]
    if first < 0 or first + count > w[coded.S_LENGTH]:
        carray(pointer(w[W_FAULT]), 1, np.int64)[0] = 1
        return
    run_spread(w[W_PARTS:], 1, address, 0, min(threads, w[W_SHAPE] * w[W_SHAPE + 1] * count // LEAST_VECTORS))
    ring_tokens = carray(pointer(w[coded.S_RING_TOKENS]), window, np.int64)
    for token in range(max(first, first + count - window), first + count):
        ring_tokens[token % window] = token
