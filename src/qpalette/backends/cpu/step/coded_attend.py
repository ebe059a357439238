"""Attention of a few queries over a cache of codes, which are read as they are.

With y' what is stored of x = A^-1 y' + m, a score is q.x = (A^-T q).y' + q.m, and a weighted sum of values is
A^-1 (sum p y') + (sum p) m: transforms are applied to queries and to sums, never to a token. Tokens that are kept exact
are scored and added apart from those.

The tokens of a head are cut into pieces of a fixed length, whose sums are put together in their order: the same bits
with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray

from qpalette.backends.cpu.calls import call
from qpalette.backends.cpu.jit import entry, inlined, kernel
from qpalette.backends.cpu.operands import address_after, pointer, read_values, write_values
from qpalette.backends.cpu.step import coded
from qpalette.backends.cpu.step.coded_write import add_row, multiply_rows
from qpalette.backends.cpu.step.kernels import (
    NUMBERS,
    exponential,
    load_floats,
    place_of_largest,
    run_spread,
    spread,
    total_of,
    words_at,
)
from qpalette.backends.cpu.step.native import Address, Native
from qpalette.backends.cpu.step.record import Operand
from qpalette.backends.cpu.step.walk import broadcast
from qpalette.kvcache import PAGE

PIECE = 4 * PAGE  # tokens
TOP, TOTAL, CODED = range(3)  # of a piece and row: the largest score, sums of all and of coded tokens' weights
LEAST_NUMBERS = 1 << 15  # of keys, per thread

# The words of attention: those of the keys' stream, of the values'; then batch, heads, rows (queries of a head), the
# scale, float64; address of how many tokens there are, and of each sequence's first; of query, mask and result the
# address and strides, the query's and result's but for the last; the mask's type; the kernels: of `run_spread`, then
# for scores of a page and for sums.
K, V, A_SHAPE = 0, coded.S_WORDS, 2 * coded.S_WORDS
A_SCALE, A_COUNT, A_STARTS, A_QUERY, A_MASK, A_RESULT = (A_SHAPE + place for place in (3, 4, 5, 6, 10, 15))
A_MASK_TYPE, A_PARTS = A_RESULT + 4, A_RESULT + 5
A_SCORES, A_SUMS = A_PARTS + 4, A_PARTS + 5
A_WORDS = A_SUMS + 1


def attend_call(keys: list[Any], values: list[Any], operands: Sequence[Operand], scale: int) -> Native:
    """keys and values: `coded.stream_words`; operands: query [batch, heads, rows, dim], of the streams' type, numbers
    of a row behind each other; mask, bool or float, broadcast to [batch, heads, rows, length]; how many tokens there
    are, int64 []; each sequence's first, int64 [batch]; the result, like the query; scale: a float64 as a word."""
    query, mask, count, starts, result = operands
    for stream in (keys, values):
        stream[coded.S_ROWS] = query.shape[2]
    shape = query.shape[:3]
    words = [*keys, *values, *shape, scale, count, starts, query, *query.strides[:3]]
    words += [mask, *broadcast(mask, (*shape, keys[coded.S_LENGTH])), result, *result.strides[:3], NUMBERS[mask.dtype]]
    of_pages = coded.kernels_of_pages(keys).scores, coded.kernels_of_pages(values).sums
    return Native(attend, [*words, *map(Address, (spread, turn_queries, attend_pieces, finish_heads, *of_pages))])


@inlined
def _floats(address, size):  # type: ignore[no-untyped-def]
    return carray(pointer(address), size, np.float32)


@inlined
def _matrix(w, stream, which, head):  # type: ignore[no-untyped-def]
    dim = w[stream + coded.S_DIM]
    own = 0 if w[stream + coded.S_SHARED] else head
    return _floats(w[stream + which] + 4 * own * dim * dim, dim * dim)


@inlined
def _mean(w, stream, head):  # type: ignore[no-untyped-def]
    dim = w[stream + coded.S_DIM]
    own = 0 if w[stream + coded.S_SHARED] else head
    return _floats(w[stream + coded.S_MEAN] + 4 * own * dim, dim)


@inlined
def _across(w, stream):  # type: ignore[no-untyped-def]
    """Coordinates of a row, neighbours apart, with what pads them."""
    return w[stream + coded.S_WIDTH] * coded.padded(w[stream + coded.S_UNITS])


@inlined
def _memory(w, memory):  # type: ignore[no-untyped-def]
    """float32, by heads of all sequences: queries times the scale [rows, dim]; the same in the keys' coordinates; what
    the keys' mean adds to scores [rows]; then by pieces, too, and rows: the largest score, the sum of weights and that
    of coded tokens' weights; weighted coordinates of values; weighted exact values."""
    items, rows, pieces = w[A_SHAPE] * w[A_SHAPE + 1], w[A_SHAPE + 2], _pieces(w)
    sizes = (w[K + coded.S_DIM], _across(w, K), 1, 3 * pieces, _across(w, V) * pieces)
    at = memory
    query = carray(pointer(at), (items, rows, sizes[0]), np.float32)
    at += 4 * items * rows * sizes[0]
    turned = carray(pointer(at), (items, rows, sizes[1]), np.float32)
    at += 4 * items * rows * sizes[1]
    offsets = carray(pointer(at), (items, rows), np.float32)
    at += 4 * items * rows
    weights = carray(pointer(at), (items, pieces, 3, rows), np.float32)
    at += 4 * items * rows * sizes[3]
    sums = carray(pointer(at), (items, pieces, rows, _across(w, V)), np.float32)
    at += 4 * items * rows * sizes[4]
    plain = carray(pointer(at), (items, pieces, rows, w[V + coded.S_DIM]), np.float32)
    return query, turned, offsets, weights, sums, plain


@inlined
def _size(w):  # type: ignore[no-untyped-def]
    """Of that memory, for each row of each head."""
    of_piece = 3 + _across(w, V) + w[V + coded.S_DIM]
    return w[K + coded.S_DIM] + _across(w, K) + 1 + _pieces(w) * of_piece


@inlined
def _pieces(w):  # type: ignore[no-untyped-def]
    return (carray(pointer(w[A_COUNT]), 1, np.int64)[0] + PIECE - 1) // PIECE


@entry("cache attend queries")
def turn_queries(address, memory, worker, workers, unused):  # type: ignore[no-untyped-def]
    """Of every `workers`-th head: queries times the scale; A^-T q, neighbours apart, zeros where they are padded; and
    q.m."""
    w = words_at(address, A_WORDS)
    heads, dim = w[A_SHAPE + 1], w[K + coded.S_DIM]
    type_, width, across = w[K + coded.S_TYPE], w[K + coded.S_WIDTH], coded.padded(w[K + coded.S_UNITS])
    scale = np.float32(carray(pointer(address + 8 * A_SCALE), 1, np.float64)[0])
    query, turned, offsets = _memory(w, memory)[:3]
    coordinates = np.empty(dim, np.float32)
    for item in range(worker, len(query), workers):
        batch, head = item // heads, item % heads
        inverse, mean = _matrix(w, K, coded.S_INVERSE, head), _mean(w, K, head)
        turned[item] = 0
        for row in range(w[A_SHAPE + 2]):
            q, place = query[item, row], batch * w[A_QUERY + 1] + head * w[A_QUERY + 2] + row * w[A_QUERY + 3]
            read_values(address_after(w[A_QUERY], place, type_), type_, q)
            for i in range(dim):
                q[i] *= scale
                coordinates[i] = q[i] * mean[i]
            offsets[item, row] = total_of(coordinates)
            multiply_rows(q, inverse, 0, coordinates)
            for i in range(dim):
                turned[item, row, i % width * across + i // width] = coordinates[i]


@kernel
def load_bias(w, batch, head, start, bias):  # type: ignore[no-untyped-def]
    """What the mask adds to scores of tokens from `start` on, float32 [rows, tokens]: minus infinity where it hides."""
    type_, step = w[A_MASK_TYPE], w[A_MASK + 4]
    itemsize = 4 if type_ == 0 else 2 if type_ <= 2 else 1
    for row in range(len(bias)):
        if row and w[A_MASK + 3] == 0:
            bias[row] = bias[0]
            continue
        place = batch * w[A_MASK + 1] + head * w[A_MASK + 2] + row * w[A_MASK + 3] + start * step
        load_floats(w[A_MASK] + place * itemsize, type_, step, bias[row])
        if type_ > 2:
            for i in range(bias.shape[1]):
                bias[row, i] = np.float32(0) if bias[row, i] != 0 else np.float32(-np.inf)


@kernel
def find_exact(w, batch, at_head, start, tokens, exact):  # type: ignore[no-untyped-def]
    """How many of `tokens` from `start` on are kept exact: which, and the addresses of their keys and values, go to
    `exact`, int64 [., 3]."""
    count = carray(pointer(w[A_COUNT]), 1, np.int64)[0]
    sinks, window = w[K + coded.S_SINK_COUNT], w[K + coded.S_WINDOW]
    first, found = carray(pointer(w[A_STARTS]), batch + 1, np.int64)[batch], 0
    for token in range(max(start, first), min(start + tokens, first + sinks)):
        keep_place(w, coded.S_SINKS, at_head * sinks + token - first, token - start, exact[found])
        found += 1
    ring_tokens = carray(pointer(w[K + coded.S_RING_TOKENS]), window, np.int64)
    for token in range(max(start, count - window), min(start + tokens, count)):
        if ring_tokens[token % window] == token and not first <= token < first + sinks:
            keep_place(w, coded.S_RING, at_head * window + token % window, token - start, exact[found])
            found += 1
    return found


@inlined
def keep_place(w, where, vector, token, into):  # type: ignore[no-untyped-def]
    into[0] = token
    into[1] = address_after(w[K + where], vector * w[K + coded.S_DIM], w[K + coded.S_TYPE])
    into[2] = address_after(w[V + where], vector * w[V + coded.S_DIM], w[V + coded.S_TYPE])


@inlined
def _page(w, stream, at_head, number):  # type: ignore[no-untyped-def]
    page = at_head * w[stream + coded.S_PAGE_COUNT] + number
    return w[stream + coded.S_PAGES] + page * w[stream + coded.S_PAGE_BYTES]


@kernel
def score(w, address, at_head, start, query, turned, offsets, exact, scores):  # type: ignore[no-untyped-def]
    """Adds to `scores`, which hold what the mask adds."""
    rows, tokens = scores.shape
    tile, key = np.empty((rows, PAGE), np.float32), np.empty(query.shape[1], np.float32)
    for first in range(0, tokens, PAGE):
        size, hidden = min(PAGE, tokens - first), True
        for row in range(rows):
            for i in range(first, first + size):
                hidden &= scores[row, i] == -np.inf
        if hidden:
            continue
        page = _page(w, K, at_head, (start + first) // PAGE)
        call(w[A_SCORES], address + 8 * K, page, turned.ctypes.data, tile.ctypes.data, size)
        for row in range(rows):
            for i in range(size):
                tile[row, i] += offsets[row]
        for token, place, _ in exact:
            if first <= token < first + size:
                read_values(place, w[K + coded.S_TYPE], key)
                for row in range(rows):
                    tile[row, token - first] = 0
                    for j in range(key.size):
                        tile[row, token - first] += query[row, j] * key[j]
        for row in range(rows):
            for i in range(size):
                scores[row, first + i] += tile[row, i]


@kernel
def weigh(scores, weights):  # type: ignore[no-untyped-def]
    """scores become e^(score - top), the top of their row; zeros where all are hidden."""
    for row in range(len(scores)):
        each = scores[row]
        top = each[place_of_largest(each)]
        for i in range(each.size):
            each[i] = exponential(each[i] - top)
        if top == -np.inf:
            each[:] = 0
        weights[TOP, row], weights[TOTAL, row] = top, total_of(each)


@kernel
def add_values(w, address, at_head, start, weights, exact, of_coded, sums, plain):  # type: ignore[no-untyped-def]
    """The weighted values: coordinates into `sums`, exact ones into `plain`; the weights of the former together. What
    is exact weighs nothing afterwards."""
    rows, tokens = weights.shape
    tile, value = np.zeros((rows, PAGE), np.float32), np.empty(plain.shape[1], np.float32)
    sums[:] = 0
    plain[:] = 0
    for token, _, place in exact:
        read_values(place, w[V + coded.S_TYPE], value)
        for row in range(rows):
            add_row(value, 0, value.size, weights[row, token], plain[row])
            weights[row, token] = 0
    for row in range(rows):
        of_coded[row] = total_of(weights[row])
    for first in range(0, tokens, PAGE):
        size = min(PAGE, tokens - first)
        for row in range(rows):
            tile[row, :size] = weights[row, first : first + size]
        page = _page(w, V, at_head, (start + first) // PAGE)
        call(w[A_SUMS], address + 8 * V, page, tile.ctypes.data, sums.ctypes.data, size)


@entry("cache attend pieces")
def attend_pieces(address, memory, worker, workers, unused):  # type: ignore[no-untyped-def]
    """Every `workers`-th piece."""
    w = words_at(address, A_WORDS)
    count, pieces = carray(pointer(w[A_COUNT]), 1, np.int64)[0], _pieces(w)
    query, turned, offsets, weights, sums, plain = _memory(w, memory)
    rows, exact = query.shape[1], np.empty((PIECE, 3), np.int64)
    memory_of_scores = np.empty(rows * PIECE, np.float32)
    for each in range(worker, len(query) * pieces, workers):
        item, piece = each // pieces, each % pieces
        batch, head, start = item // w[A_SHAPE + 1], item % w[A_SHAPE + 1], piece * PIECE
        tokens = min(PIECE, count - start)
        scores = memory_of_scores[: rows * tokens].reshape((rows, tokens))
        kept = exact[: find_exact(w, batch, item, start, tokens, exact)]
        load_bias(w, batch, head, start, scores)
        score(w, address, item, start, query[item], turned[item], offsets[item], kept, scores)
        weigh(scores, weights[item, piece])
        into = weights[item, piece, CODED], sums[item, piece], plain[item, piece]
        add_values(w, address, item, start, scores, kept, *into)


@entry("cache attend heads")
def finish_heads(address, memory, worker, workers, unused):  # type: ignore[no-untyped-def]
    """Pieces of every `workers`-th head put together, coordinates turned back; zeros for a query that sees nothing."""
    w = words_at(address, A_WORDS)
    heads, dim, type_ = w[A_SHAPE + 1], w[V + coded.S_DIM], w[V + coded.S_TYPE]
    width, across = w[V + coded.S_WIDTH], coded.padded(w[V + coded.S_UNITS])
    weights, sums, plain = _memory(w, memory)[3:]
    result, joined = np.empty(dim, np.float32), np.empty(sums.shape[3], np.float32)
    coordinates, turned = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for item in range(worker, len(sums), workers):
        batch, head = item // heads, item % heads
        inverse, mean = _matrix(w, V, coded.S_INVERSE_T, head), _mean(w, V, head)
        for row in range(w[A_SHAPE + 2]):
            top, total, of_coded = np.float32(-np.inf), np.float32(0), np.float32(0)
            for piece in range(sums.shape[1]):
                top = max(top, weights[item, piece, TOP, row])
            result[:] = 0
            joined[:] = 0
            for piece in range(sums.shape[1]):
                if weights[item, piece, TOP, row] != -np.inf:
                    factor = exponential(weights[item, piece, TOP, row] - top)
                    total += factor * weights[item, piece, TOTAL, row]
                    of_coded += factor * weights[item, piece, CODED, row]
                    add_row(sums[item, piece, row], 0, joined.size, factor, joined)
                    add_row(plain[item, piece, row], 0, dim, factor, result)
            for i in range(dim):
                coordinates[i] = joined[i % width * across + i // width]
            multiply_rows(coordinates, inverse, 0, turned)
            for i in range(dim):
                result[i] += turned[i] + of_coded * mean[i]
                if total != 0:
                    result[i] /= total
            place = batch * w[A_RESULT + 1] + head * w[A_RESULT + 2] + row * w[A_RESULT + 3]
            write_values(result, type_, address_after(w[A_RESULT], place, type_))


@entry("cache attend")
def attend(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
    """softmax(scale q k^T + mask) v over the tokens that there are, in float32 but for what comes and goes."""
    w = words_at(address, A_WORDS)
    items, pieces = w[A_SHAPE] * w[A_SHAPE + 1], _pieces(w)
    memory = np.empty(items * w[A_SHAPE + 2] * _size(w), np.float32)
    numbers = items * pieces * PIECE * w[K + coded.S_DIM]
    workers = min(threads, items * pieces, numbers // LEAST_NUMBERS)
    for part in range(1, 4):
        run_spread(w[A_PARTS:], part, address, memory.ctypes.data, workers)
