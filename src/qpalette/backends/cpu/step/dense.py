"""Kernels of a program that multiply what is not packed: a few vectors by a matrix, and attention of a few queries over
a static cache."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, prange

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.jit import entry, get_num_threads, inlined, kernel, parallel_kernel, set_num_threads
from qpalette.backends.cpu.operands import TYPES, pointer, read_values, write_values
from qpalette.backends.cpu.step.kernels import load_floats, softmax_in_place, words_at

LANES = simd.LANES
LEAST_PRODUCTS = 1 << 16  # per thread


@inlined
def _float(value):  # type: ignore[no-untyped-def]
    return value


@inlined
def _widened(bits):  # type: ignore[no-untyped-def]
    return simd.scalar_of_bits(np.int32(bits) << 16)


_LOADS = (simd.loadf, simd.load_bfloat, simd.load_half)  # in the order of TYPES
_WIDENERS = (_float, _widened, simd.half_to_float)
_ARRAYS = (np.float32, np.int16, np.int16)

# The words of products x [B, M, K] W [B, K, N]: B, M, K, N; address and strides of x, but for the last, 1; of W, of
# which one of the last two is 1; the address of the bias [N] or 0; address and strides of the result, but for the last.
P_PRODUCTS, P_VECTORS, P_INPUTS, P_COLUMNS, P_X, P_W, P_BIAS, P_RESULT = 0, 1, 2, 3, 4, 7, 11, 12
P_WORDS = 15

# The words of attention. Shapes: batch, heads, queries, keys, width, width of values. Then of query, key, value, mask
# and result the address and four strides; the number of the mask's type; the scale, float64.
A_SHAPES, A_OPERANDS = 0, 6
A_QUERY, A_KEY, A_VALUE, A_MASK, A_RESULT = (A_OPERANDS + 5 * place for place in range(5))
A_MASK_TYPE = A_OPERANDS + 25
A_SCALE = A_MASK_TYPE + 1
A_WORDS = A_SCALE + 1


@lru_cache(maxsize=len(TYPES))
def make_dense(type_: int) -> tuple[Any, Any]:
    """(product, attention) of operands of a type, by its number."""
    load, widen, element = _LOADS[type_], _WIDENERS[type_], _ARRAYS[type_]
    itemsize = np.dtype(element).itemsize

    @inlined
    def dot(x, row, at, size):  # type: ignore[no-untyped-def]
        """Of float32 x and `size` elements of `row` from `at` on."""
        whole = size // LANES * LANES
        first, second = simd.splatf(np.float32(0)), simd.splatf(np.float32(0))
        pairs = whole // (2 * LANES) * 2 * LANES
        for k in range(0, pairs, 2 * LANES):
            first = simd.fmaf(simd.loadf(x, k), load(row, at + k), first)
            second = simd.fmaf(simd.loadf(x, k + LANES), load(row, at + k + LANES), second)
        if pairs < whole:
            first = simd.fmaf(simd.loadf(x, pairs), load(row, at + pairs), first)
        total = simd.totalf(simd.addf(first, second))
        for k in range(whole, size):
            total += x[k] * widen(row[at + k])
        return total

    @inlined
    def add_scaled(row, at, size, share, out):  # type: ignore[no-untyped-def]
        whole, factor = size // LANES * LANES, simd.splatf(share)
        for k in range(0, whole, LANES):
            simd.store(out, k, simd.fmaf(factor, load(row, at + k), simd.loadf(out, k)))
        for k in range(whole, size):
            out[k] += share * widen(row[at + k])

    @kernel
    def multiply_some(w, worker, workers, results):  # type: ignore[no-untyped-def]
        """Neighbouring columns of the results, over all products."""
        vectors, inputs, columns = w[P_VECTORS], w[P_INPUTS], w[P_COLUMNS]
        total, down, across = w[P_PRODUCTS] * columns, w[P_W + 2], w[P_W + 3]
        start, stop = total * worker // workers, total * (worker + 1) // workers
        x = np.empty((vectors, inputs), np.float32)
        for item in range(w[P_PRODUCTS]):
            first, end = max(0, start - item * columns), min(columns, stop - item * columns)
            if first >= end:
                continue
            for vector in range(vectors):
                place = w[P_X] + (item * w[P_X + 1] + vector * w[P_X + 2]) * itemsize
                read_values(place, type_, x[vector])
            place = w[P_W] + item * w[P_W + 1] * itemsize
            weight = carray(pointer(place), (inputs - 1) * down + (columns - 1) * across + 1, element)
            if down == 1:
                for column in range(first, end):
                    for vector in range(vectors):
                        results[item, vector, column] = dot(x[vector], weight, column * across, inputs)
            else:
                for k in range(inputs):
                    for vector in range(vectors):
                        sums = results[item, vector, first:end]
                        add_scaled(weight, k * down + first, end - first, x[vector, k], sums)

    @parallel_kernel
    def multiply_in_parallel(w, workers, results):  # type: ignore[no-untyped-def]
        for worker in prange(workers):
            multiply_some(w, worker, workers, results)

    @entry(f"step product {type_}")
    def product(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
        """result = x W + bias, summed in float32 and rounded once."""
        w = words_at(address, P_WORDS)
        columns = w[P_COLUMNS]
        results = np.zeros((w[P_PRODUCTS], w[P_VECTORS], columns), np.float32)
        workers = min(threads, results.size * w[P_INPUTS] // LEAST_PRODUCTS)
        if workers > 1:
            before = get_num_threads()
            set_num_threads(workers)
            multiply_in_parallel(w, workers, results)
            set_num_threads(before)
        else:
            multiply_some(w, 0, 1, results)
        bias = np.zeros(columns, np.float32)
        if w[P_BIAS]:
            read_values(w[P_BIAS], type_, bias)
        for item in range(w[P_PRODUCTS]):
            for vector in range(w[P_VECTORS]):
                row = results[item, vector]
                for column in range(columns):
                    row[column] += bias[column]
                place = w[P_RESULT] + (item * w[P_RESULT + 1] + vector * w[P_RESULT + 2]) * itemsize
                write_values(row, type_, place)

    @inlined
    def put_scores(x, rows, seen, count, apart, size, out):  # type: ignore[no-untyped-def]
        """Products of float32 x with the rows that are seen, sixteen at a time, each summed as it would be alone."""
        whole, quads = size // LANES * LANES, np.empty(4 * LANES, np.float32)
        for first in range(0, count, LANES):
            for quad in range(4):
                i, zero = first + 4 * quad, simd.splatf(np.float32(0))
                p, q, r, s = seen[i] * apart, seen[i + 1] * apart, seen[i + 2] * apart, seen[i + 3] * apart
                a, b, c, d = zero, zero, zero, zero
                for k in range(0, whole, LANES):
                    part = simd.loadf(x, k)
                    a, b = simd.fmaf(part, load(rows, p + k), a), simd.fmaf(part, load(rows, q + k), b)
                    c, d = simd.fmaf(part, load(rows, r + k), c), simd.fmaf(part, load(rows, s + k), d)
                simd.store(quads, quad * LANES, simd.quad_sums(a, b, c, d))
            a, b = simd.loadf(quads, 0), simd.loadf(quads, LANES)
            c, d = simd.loadf(quads, 2 * LANES), simd.loadf(quads, 3 * LANES)
            simd.store(out, first, simd.quarter_sums(a, b, c, d))
        for i in range(count if whole < size else 0):
            for k in range(whole, size):
                out[i] += x[k] * widen(rows[seen[i] * apart + k])

    @inlined
    def put_sums(shares, rows, seen, count, apart, size, out):  # type: ignore[no-untyped-def]
        """The rows that are seen times their shares, summed in their order in registers."""
        whole, four = size // LANES * LANES, size // (4 * LANES) * 4 * LANES
        for k in range(0, four, 4 * LANES):
            zero = simd.splatf(np.float32(0))
            a, b, c, d = zero, zero, zero, zero
            for i in range(count):
                at, share = seen[i] * apart + k, simd.load_splatf(shares, i)
                a = simd.fmaf(share, load(rows, at), a)
                b = simd.fmaf(share, load(rows, at + LANES), b)
                c = simd.fmaf(share, load(rows, at + 2 * LANES), c)
                d = simd.fmaf(share, load(rows, at + 3 * LANES), d)
            simd.store(out, k, a)
            simd.store(out, k + LANES, b)
            simd.store(out, k + 2 * LANES, c)
            simd.store(out, k + 3 * LANES, d)
        for k in range(four, whole, LANES):
            a = simd.splatf(np.float32(0))
            for i in range(count):
                a = simd.fmaf(simd.load_splatf(shares, i), load(rows, seen[i] * apart + k), a)
            simd.store(out, k, a)
        for k in range(whole, size):
            out[k] = np.float32(0)
            for i in range(count):
                out[k] += shares[i] * widen(rows[seen[i] * apart + k])

    @kernel
    def see(w, batch, head, bias, seen):  # type: ignore[no-untyped-def]
        """Fill `bias`, [queries or 1, keys], with the mask, and `seen` with the keys that it leaves to some query, then
        the last of them sixteen times; how many they are."""
        queries, keys, count = bias.shape[0], bias.shape[1], 0
        for q in range(queries if w[A_MASK] else 0):
            place = _at(w, A_MASK, batch, head, q, 4 if w[A_MASK_TYPE] == 0 else 2)
            load_floats(place, w[A_MASK_TYPE], w[A_MASK + 4], bias[q])
        for key in range(keys):
            hidden = True
            for q in range(queries):
                hidden &= bias[q, key] == -np.inf
            seen[count] = key
            count += 1 - hidden
        for place in range(count, count + LANES if count else 0):
            seen[place] = seen[count - 1]
        return count

    @kernel
    def attend_heads(w, worker, workers):  # type: ignore[no-untyped-def]
        """Neighbouring heads, over all sequences: most of them have the same mask."""
        heads, queries, keys = w[A_SHAPES + 1], w[A_SHAPES + 2], w[A_SHAPES + 3]
        width, value_width = w[A_SHAPES + 4], w[A_SHAPES + 5]
        scale = np.float32(carray(pointer(_address_of(w) + 8 * A_SCALE), 1, np.float64)[0])
        biases = 1 if w[A_MASK + 3] == 0 else queries
        bias, seen, count, masked = np.zeros((biases, keys), np.float32), np.empty(keys + LANES, np.int64), 0, -1
        query, sums = np.empty(width, np.float32), np.empty(value_width, np.float32)
        scores = np.empty(keys + LANES, np.float32)
        items = w[A_SHAPES] * heads
        for item in range(items * worker // workers, items * (worker + 1) // workers):
            batch, head = item // heads, item % heads
            mask = _at(w, A_MASK, batch, head, 0, 4 if w[A_MASK_TYPE] == 0 else 2)
            if mask != masked:
                count, masked = see(w, batch, head, bias, seen), mask
            of_keys, of_values = w[A_KEY + 3], w[A_VALUE + 3]
            key_rows = carray(pointer(_at(w, A_KEY, batch, head, 0, itemsize)), (keys - 1) * of_keys + width, element)
            place = _at(w, A_VALUE, batch, head, 0, itemsize)
            value_rows = carray(pointer(place), (keys - 1) * of_values + value_width, element)
            for q in range(queries):
                read_values(_at(w, A_QUERY, batch, head, q, itemsize), type_, query)
                for i in range(width):
                    query[i] *= scale
                put_scores(query, key_rows, seen, count, of_keys, width, scores)
                for i in range(count):
                    scores[i] += bias[min(q, biases - 1), seen[i]]
                if count:
                    softmax_in_place(scores[:count])
                put_sums(scores, value_rows, seen, count, of_values, value_width, sums)
                write_values(sums, type_, _at(w, A_RESULT, batch, head, q, itemsize))

    @parallel_kernel
    def attend_in_parallel(w, workers):  # type: ignore[no-untyped-def]
        for worker in prange(workers):
            attend_heads(w, worker, workers)

    @entry(f"step attention {type_}")
    def attention(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
        """softmax(scale q k^T + mask) v, in float32 but for what comes and goes. Keys that the mask hides from all
        queries are not read; a query that sees none gets zeros."""
        w = words_at(address, A_WORDS)
        items = w[A_SHAPES] * w[A_SHAPES + 1]
        workers = min(threads, items)
        if workers > 1 and items * w[A_SHAPES + 2] * w[A_SHAPES + 3] * w[A_SHAPES + 4] > workers * LEAST_PRODUCTS * 4:
            before = get_num_threads()
            set_num_threads(workers)
            attend_in_parallel(w, workers)
            set_num_threads(before)
        else:
            attend_heads(w, 0, 1)

    return product, attention


@inlined
def _at(w, operand, batch, head, row, itemsize):  # type: ignore[no-untyped-def]
    return w[operand] + (batch * w[operand + 1] + head * w[operand + 2] + row * w[operand + 3]) * itemsize


@inlined
def _address_of(w):  # type: ignore[no-untyped-def]
    return w.ctypes.data
