"""The compiled kernels of a program: each takes the address of its own words, int64, in which it finds what it reads,
where, and how far apart; and memory to compute in.

All have the five arguments of a packed product's kernel, so that one loop runs them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, prange

from qpalette.backends.cpu import simd
from qpalette.backends.cpu.calls import call
from qpalette.backends.cpu.jit import entry, get_num_threads, inlined, kernel, set_num_threads
from qpalette.backends.cpu.operands import TYPES, pointer, read_values, write_values

_INT64, _INT32, _BOOL, _UINT8 = range(len(TYPES), len(TYPES) + 4)
NUMBERS = TYPES | {torch.int64: _INT64, torch.int32: _INT32, torch.bool: _BOOL, torch.uint8: _UINT8}
DIMENSIONS = 4  # of a walk, after those that lie behind each other are one
CHUNK = 512  # values that are computed on at once
OPERANDS = 4  # of an elementwise operation: its result, then what it reads
SCRATCH = 8 * (CHUNK + 1) * OPERANDS  # bytes: values, and where they are

# The words of an elementwise operation.
E_KERNEL, E_INTEGERS, E_INPUTS, E_SIZES, E_OPERANDS = 0, 1, 2, 3, 3 + DIMENSIONS
E_OPERAND = 2 + DIMENSIONS  # address, number of the type, strides
E_SCALARS = E_OPERANDS + OPERANDS * E_OPERAND
E_WORDS = E_SCALARS + 2


@entry("step run")
def run(table, threads):  # type: ignore[no-untyped-def]
    """table int64 [calls, 5]: the address of a kernel, and four words for it."""
    for i in range(len(table)):
        call(table[i, 0], table[i, 1], table[i, 2], table[i, 3], table[i, 4], threads)


@entry("step spread", parallel=True)
def spread(part, words, memory, workers, unused):  # type: ignore[no-untyped-def]
    """`part`, a kernel's address, with each worker's number and how many they are, at the same time."""
    before = get_num_threads()
    set_num_threads(workers)
    for worker in prange(workers):
        call(part, words, memory, worker, workers, 0)
    set_num_threads(before)


@inlined
def run_spread(addresses, part, words, memory, workers):  # type: ignore[no-untyped-def]
    """addresses: of `spread`, then of the parts: none is compiled into others, which would take its time again."""
    if workers > 1:
        call(addresses[0], addresses[part], words, memory, workers, 0)
    else:
        call(addresses[part], words, memory, 0, 1, 0)


@inlined
def words_at(address, count):  # type: ignore[no-untyped-def]
    return carray(pointer(address), count, np.int64)


@kernel
def load_floats(address, type_, stride, out):  # type: ignore[no-untyped-def]
    """Fill float32 `out` with values of `type_`, `stride` elements apart."""
    count = out.size
    last = (count - 1) * stride + 1
    if type_ <= 2:
        if stride == 1:
            read_values(address, type_, out)
        elif stride == 0:
            read_values(address, type_, out[:1])
            out[:] = out[0]
        else:
            for i in range(count):
                read_values(address + i * stride * (4 if type_ == 0 else 2), type_, out[i : i + 1])
    elif type_ == _INT64:
        longs = carray(pointer(address), last, np.int64)
        for i in range(count):
            out[i] = np.float32(longs[i * stride])
    elif type_ == _INT32:
        ints = carray(pointer(address), last, np.int32)
        for i in range(count):
            out[i] = np.float32(ints[i * stride])
    else:
        bytes_ = carray(pointer(address), last, np.uint8)
        for i in range(count):
            out[i] = np.float32(bytes_[i * stride])


@kernel
def store_floats(values, type_, stride, address):  # type: ignore[no-untyped-def]
    """Write float32 `values` as `type_`."""
    count = values.size
    last = (count - 1) * stride + 1
    if type_ <= 2:
        if stride == 1:
            write_values(values, type_, address)
        else:
            for i in range(count):
                write_values(values[i : i + 1], type_, address + i * stride * (4 if type_ == 0 else 2))
    elif type_ == _INT64:
        longs = carray(pointer(address), last, np.int64)
        for i in range(count):
            longs[i * stride] = np.int64(values[i])
    elif type_ == _INT32:
        ints = carray(pointer(address), last, np.int32)
        for i in range(count):
            ints[i * stride] = np.int32(values[i])
    else:
        bytes_ = carray(pointer(address), last, np.uint8)
        for i in range(count):
            bytes_[i * stride] = np.uint8(values[i] != 0) if type_ == _BOOL else np.uint8(values[i])


@kernel
def load_integers(address, type_, stride, out):  # type: ignore[no-untyped-def]
    last = (out.size - 1) * stride + 1
    if type_ == _INT64:
        longs = carray(pointer(address), last, np.int64)
        for i in range(out.size):
            out[i] = longs[i * stride]
    elif type_ == _INT32:
        ints = carray(pointer(address), last, np.int32)
        for i in range(out.size):
            out[i] = ints[i * stride]
    else:
        bytes_ = carray(pointer(address), last, np.uint8)
        for i in range(out.size):
            out[i] = bytes_[i * stride]


@kernel
def store_integers(values, type_, stride, address):  # type: ignore[no-untyped-def]
    last = (values.size - 1) * stride + 1
    if type_ == _INT64:
        longs = carray(pointer(address), last, np.int64)
        for i in range(values.size):
            longs[i * stride] = values[i]
    elif type_ == _INT32:
        ints = carray(pointer(address), last, np.int32)
        for i in range(values.size):
            ints[i * stride] = np.int32(values[i])
    else:
        bytes_ = carray(pointer(address), last, np.uint8)
        for i in range(values.size):
            bytes_[i * stride] = np.uint8(values[i] != 0) if type_ == _BOOL else np.uint8(values[i])


@inlined
def _place(words, operand, a, b, c, start):  # type: ignore[no-untyped-def]
    """Where an operand's values of this row of the walk begin."""
    at = E_OPERANDS + operand * E_OPERAND
    elements = a * words[at + 2] + b * words[at + 3] + c * words[at + 4] + start * words[at + 5]
    return words[at] + elements * _itemsize(words[at + 1])


@inlined
def _itemsize(type_):  # type: ignore[no-untyped-def]
    if type_ == _INT64:
        return 8
    if type_ == 0 or type_ == _INT32:
        return 4
    return 2 if type_ <= 2 else 1


@entry("step elementwise")
def elementwise(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
    """Values of the type that is computed in, and which lie behind each other, are read and written in their places."""
    words = words_at(address, E_WORDS)
    integers, size, inputs = words[E_INTEGERS], words[E_SIZES + DIMENSIONS - 1], words[E_INPUTS]
    floats = carray(pointer(scratch), (OPERANDS, CHUNK), np.float32)
    longs = carray(pointer(scratch), (OPERANDS, CHUNK), np.int64)
    places = carray(pointer(scratch + 8 * OPERANDS * CHUNK), OPERANDS, np.int64)
    for operand in range(OPERANDS):
        places[operand] = scratch + operand * CHUNK * (8 if integers else 4)
    computed, scalars = 0 if words[E_KERNEL] else 1, address + 8 * E_SCALARS
    of_result, stride = words[E_OPERANDS + 1], words[E_OPERANDS + 5]
    for a in range(words[E_SIZES]):
        for b in range(words[E_SIZES + 1]):
            for c in range(words[E_SIZES + 2]):
                for start in range(0, size, CHUNK):
                    count = min(CHUNK, size - start)
                    for operand in range(1, 1 + inputs):
                        place, type_ = _place(words, operand, a, b, c, start), words[_type_of(operand)]
                        if _is_direct(words, operand):
                            places[operand] = place
                        elif integers:
                            load_integers(place, type_, words[_type_of(operand) + 4], longs[operand, :count])
                        else:
                            load_floats(place, type_, words[_type_of(operand) + 4], floats[operand, :count])
                    into, direct = _place(words, 0, a, b, c, start), computed == 0 and _is_direct(words, 0)
                    if direct:
                        places[0] = into
                    if computed == 0:
                        call(words[E_KERNEL], scratch + 8 * OPERANDS * CHUNK, count, scalars, 0, 0)
                    if integers and not direct:
                        store_integers(carray(pointer(places[computed]), count, np.int64), of_result, stride, into)
                    elif not direct:
                        store_floats(carray(pointer(places[computed]), count, np.float32), of_result, stride, into)


@inlined
def _type_of(operand):  # type: ignore[no-untyped-def]
    """Where its number is."""
    return E_OPERANDS + operand * E_OPERAND + 1


@inlined
def _is_direct(words, operand):  # type: ignore[no-untyped-def]
    at = _type_of(operand)
    return words[at + 4] == 1 and words[at] == (_INT64 if words[E_INTEGERS] else 0)


def scalar_kernel(name: str, function: Any, integers: bool) -> Any:
    """What `elementwise` calls for a chunk: `function` of three values and two scalars, compiled."""
    of = inlined(function)
    dtype: Any = np.int64 if integers else np.float32
    scalar: Any = np.int64 if integers else np.float64

    @entry(f"step {'integers' if integers else 'floats'} {name}")
    def compute(places, count, scalars, unused_a, unused_b):  # type: ignore[no-untyped-def]
        """places: of the result and three values, each of `count`."""
        at = carray(pointer(places), OPERANDS, np.int64)
        out, x = carray(pointer(at[0]), count, dtype), carray(pointer(at[1]), count, dtype)
        y, z = carray(pointer(at[2]), count, dtype), carray(pointer(at[3]), count, dtype)
        numbers = carray(pointer(scalars), 2, scalar)
        s, t = dtype(numbers[0]), dtype(numbers[1])
        for i in range(count):
            out[i] = of(x[i], y[i], z[i], s, t)

    return compute


# The words of a copy by index: sizes, then address and strides of source and result, of the index its address and
# strides; how far apart what the index counts is, in the source and in the result; how many it may count; bytes of an
# element; where to say that an index is out of range.
I_SIZES, I_SOURCE, I_RESULT, I_INDEX = 0, DIMENSIONS, 2 * DIMENSIONS + 1, 3 * DIMENSIONS + 2
I_STEPS = 4 * DIMENSIONS + 3
I_WORDS = I_STEPS + 5


@entry("step indexed")
def indexed(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
    """result[.., index, ..] = source, or result = source[.., index, ..]."""
    w = words_at(address, I_WORDS)
    from_step, to_step, limit, itemsize = w[I_STEPS], w[I_STEPS + 1], w[I_STEPS + 2], w[I_STEPS + 3]
    n = w[I_SIZES + 3]
    whole = w[I_INDEX + 4] == 0 and w[I_SOURCE + 4] == 1 and w[I_RESULT + 4] == 1
    for a in range(w[I_SIZES]):
        for b in range(w[I_SIZES + 1]):
            for c in range(w[I_SIZES + 2]):
                i = a * w[I_INDEX + 1] + b * w[I_INDEX + 2] + c * w[I_INDEX + 3]
                source = a * w[I_SOURCE + 1] + b * w[I_SOURCE + 2] + c * w[I_SOURCE + 3]
                result = a * w[I_RESULT + 1] + b * w[I_RESULT + 2] + c * w[I_RESULT + 3]
                for d in range(1 if whole else n):
                    index = carray(pointer(w[I_INDEX] + 8 * (i + d * w[I_INDEX + 4])), 1, np.int64)[0]
                    if index < 0:
                        index += limit
                    if index < 0 or index >= limit:
                        carray(pointer(w[I_STEPS + 4]), 1, np.int64)[0] = 1
                        continue
                    x = w[I_SOURCE] + (source + d * w[I_SOURCE + 4] + index * from_step) * itemsize
                    y = w[I_RESULT] + (result + d * w[I_RESULT + 4] + index * to_step) * itemsize
                    size = n * itemsize if whole else itemsize
                    if size % 4 == 0:
                        carray(pointer(y), size // 4, np.int32)[:] = carray(pointer(x), size // 4, np.int32)
                    else:
                        carray(pointer(y), size, np.uint8)[:] = carray(pointer(x), size, np.uint8)


SUM, MEAN, LARGEST, SMALLEST, SOFTMAX, LARGEST_AT = range(6)
# The words of a reduction of rows: which; sizes of three dimensions and of a row; for the source, the result and where
# its place goes (0: nowhere): address, type, three strides, stride in a row.
R_WHICH, R_SIZES, R_SOURCE = 0, 1, 5
R_OPERAND = 6
R_RESULT, R_AT = R_SOURCE + R_OPERAND, R_SOURCE + 2 * R_OPERAND
R_WORDS = R_SOURCE + 3 * R_OPERAND


@kernel
def total_of(values):  # type: ignore[no-untyped-def]
    """The sum of float32 values, in sixteen parts."""
    parts = simd.splatf(np.float32(0))
    whole = values.size // 16 * 16
    for i in range(0, whole, 16):
        parts = simd.addf(parts, simd.loadf(values, i))
    total = simd.totalf(parts)
    for i in range(whole, values.size):
        total += values[i]
    return total


@kernel
def place_of_largest(values):  # type: ignore[no-untyped-def]
    """Of equal ones the first; a NaN is above all."""
    place, whole = 0, values.size // 16 * 16
    if whole:
        place = _place_in_lanes(values, whole)
    for i in range(whole, values.size):
        if values[i] > values[place] or (values[i] != values[i] and values[place] == values[place]):
            place = i
    return place


@kernel
def _place_in_lanes(values, whole):  # type: ignore[no-untyped-def]
    """Of the first `whole` values, sixteen side by side."""
    largest, where, odd = simd.splatf(np.float32(-np.inf)), simd.splati(np.int32(0)), simd.splati(np.int32(0))
    for i in range(0, whole, 16):
        lanes = simd.loadf(values, i)
        where = simd.where_lessi(largest, lanes, simd.splati(np.int32(i)), where)
        largest = simd.where_lessf(largest, lanes, lanes, largest)
        odd = simd.maxi(odd, simd.andi(simd.bits_of_float(lanes), simd.splati(np.int32(0x7FFFFFFF))))
    if simd.largest(odd) > 0x7F800000:  # a NaN
        for i in range(whole):
            if values[i] != values[i]:
                return i
    starts = np.empty(16, np.int32)
    simd.store(starts, 0, where)
    place = np.int64(starts[0])
    for lane in range(1, 16):
        other = np.int64(starts[lane]) + lane
        if values[other] > values[place] or (values[other] == values[place] and other < place):
            place = other
    return place


@kernel
def exponential(x):  # type: ignore[no-untyped-def]
    """e^x, float32, within 2 units in the last place: 2^n times a polynomial, after Cephes."""
    bounded = min(max(x, np.float32(-104.0)), np.float32(89.0))
    n = np.floor(bounded * np.float32(1.44269504088896341) + np.float32(0.5))
    r = bounded - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    half = np.int32(n) >> 1
    other = np.int32(n) - half
    scaled = p * simd.scalar_of_bits((half + 127) << 23) * simd.scalar_of_bits((other + 127) << 23)
    return scaled if x == x else x


@entry("step reduce")
def reduce(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
    """Of each row its sum, mean, extremum or place of the largest, or the row's softmax."""
    w = words_at(address, R_WORDS)
    which, size = w[R_WHICH], w[R_SIZES + 3]
    row = np.empty(size, np.float32)
    for a in range(w[R_SIZES]):
        for b in range(w[R_SIZES + 1]):
            for c in range(w[R_SIZES + 2]):
                into = _start(w, R_RESULT, a, b, c)
                load_floats(_start(w, R_SOURCE, a, b, c), w[R_SOURCE + 1], w[R_SOURCE + 5], row)
                if which == SOFTMAX:
                    softmax_in_place(row)
                    store_floats(row, w[R_RESULT + 1], w[R_RESULT + 5], into)
                    continue
                result = np.float32(0)
                if which <= MEAN:
                    result = total_of(row)
                    if which == MEAN:
                        result = result / np.float32(size)
                else:
                    if which == SMALLEST:
                        for i in range(size):
                            row[i] = -row[i]
                    place = place_of_largest(row)
                    result = -row[place] if which == SMALLEST else row[place]
                    if w[R_AT]:
                        carray(pointer(_start(w, R_AT, a, b, c)), 1, np.int64)[0] = place
                if w[R_RESULT]:
                    row[0] = result
                    store_floats(row[:1], w[R_RESULT + 1], 1, into)


@inlined
def _start(w, at, a, b, c):  # type: ignore[no-untyped-def]
    return w[at] + (a * w[at + 2] + b * w[at + 3] + c * w[at + 4]) * _itemsize(w[at + 1])


@kernel
def softmax_in_place(row):  # type: ignore[no-untyped-def]
    largest = row[place_of_largest(row)]
    for i in range(row.size):
        row[i] = exponential(row[i] - largest)
    inverse = np.float32(1) / total_of(row)
    for i in range(row.size):
        row[i] = row[i] * inverse


# The words of a layer norm: sizes of two dimensions and of a row; address, type and two strides of source and result;
# address (0: none) and type of weight and bias; the epsilon, float64.
N_SIZES, N_SOURCE, N_RESULT, N_WEIGHT, N_BIAS, N_EPSILON = 0, 3, 7, 11, 13, 15
N_WORDS = 16


@entry("step layer norm")
def layer_norm(address, scratch, unused_a, unused_b, threads):  # type: ignore[no-untyped-def]
    w = words_at(address, N_WORDS)
    size = w[N_SIZES + 2]
    epsilon = np.float32(carray(pointer(address + 8 * N_EPSILON), 1, np.float64)[0])
    row, weight, bias = np.empty(size, np.float32), np.ones(size, np.float32), np.zeros(size, np.float32)
    if w[N_WEIGHT]:
        load_floats(w[N_WEIGHT], w[N_WEIGHT + 1], 1, weight)
    if w[N_BIAS]:
        load_floats(w[N_BIAS], w[N_BIAS + 1], 1, bias)
    for a in range(w[N_SIZES]):
        for b in range(w[N_SIZES + 1]):
            place = w[N_SOURCE] + (a * w[N_SOURCE + 2] + b * w[N_SOURCE + 3]) * _itemsize(w[N_SOURCE + 1])
            load_floats(place, w[N_SOURCE + 1], 1, row)
            mean = total_of(row) / np.float32(size)
            for i in range(size):
                row[i] -= mean
            squares = simd.splatf(np.float32(0))
            whole = size // 16 * 16
            for i in range(0, whole, 16):
                lanes = simd.loadf(row, i)
                squares = simd.fmaf(lanes, lanes, squares)
            variance = simd.totalf(squares)
            for i in range(whole, size):
                variance += row[i] * row[i]
            inverse = np.float32(1) / np.sqrt(variance / np.float32(size) + epsilon)
            for i in range(size):
                row[i] = row[i] * inverse * weight[i] + bias[i]
            place = w[N_RESULT] + (a * w[N_RESULT + 2] + b * w[N_RESULT + 3]) * _itemsize(w[N_RESULT + 1])
            store_floats(row, w[N_RESULT + 1], 1, place)
