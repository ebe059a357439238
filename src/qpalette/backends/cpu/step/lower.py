"""Torch's operations as calls of compiled kernels, where there are such."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qpalette.backends.cpu.operands import TYPES
from qpalette.backends.cpu.step import dense, kernels
from qpalette.backends.cpu.step.record import Memory, Operand, Operation, operands_of
from qpalette.backends.cpu.step.scalars import COMPARISONS, ELEMENTWISE, Elementwise, compute_kernel
from qpalette.backends.cpu.step.walk import broadcast, merged

MOST_VECTORS = 16  # of a product here


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


class _Unknown(Exception):
    """There is no kernel for this."""


def lowered(operation: Operation, read: set[Memory]) -> list[Native] | None:
    """The same in compiled kernels; None where torch has to be called. `read`: memory that some operation reads."""
    name = operation.function.overloadpacket.__name__
    given = _named(operation)
    try:
        if any(operand.dtype not in kernels.NUMBERS for operand in operands_of((given, operation.results))):
            return None
        if name in _LOWERINGS:
            return _LOWERINGS[name](operation, given, read)
        base = name.removesuffix("_") if operation.changes else name
        for place, elementwise in enumerate(ELEMENTWISE.get(base, [])):
            if all(given.get(key) == value for key, value in elementwise.on.items()):
                return _elementwise(base, place, elementwise, operation, given)
    except (_Unknown, ValueError):
        pass
    return None


def _named(operation: Operation) -> dict[str, Any]:
    """Its arguments by name, defaults as well."""
    schema = operation.function._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= zip((argument.name for argument in schema), operation.arguments, strict=False)
    return given | operation.keywords


def _need(condition: bool) -> None:
    if not condition:
        raise _Unknown


def _elementwise(
    name: str, place: int, elementwise: Elementwise, operation: Operation, given: dict[str, Any]
) -> list[Native]:
    values = [given[key] for key in elementwise.inputs]
    numbers = [1 if given.get(key) is None else given[key] for key in elementwise.numbers]
    target = (operation.changes or operation.results)[0]
    _need(not operation.changes or len(operation.changes) == 1)
    whole = all(_is_whole(value) for value in (*values, *numbers, target))
    integers = whole and elementwise.integers is not None
    _need(integers or elementwise.floats is not None)
    of_numbers = _compared(values) if name in COMPARISONS else torch.float32
    dtype = torch.int64 if integers else of_numbers
    inputs = [value if isinstance(value, Operand) else _constant(value, dtype) for value in values]
    kernel = compute_kernel(name, place, integers)
    return [elementwise_call(kernel, integers, target, inputs, numbers)] if target.numel else []


def elementwise_call(
    kernel: Any, integers: bool, target: Operand, inputs: Sequence[Operand], numbers: Sequence[float] = ()
) -> Native:
    """`target` is what the compute kernel makes of `inputs`, broadcast to it; None: the one input itself."""
    for operand in inputs:
        _need(operand.memory is not target.memory or operand[1:] == target[1:])  # would be written before it is read
    strides = [list(target.strides), *(broadcast(operand, target.shape) for operand in inputs)]
    sizes, steps = merged(target.shape, strides, kernels.DIMENSIONS)
    words: list[Any] = [0 if kernel is None else Address(kernel), int(integers), len(inputs), *sizes]
    for place in range(kernels.OPERANDS):
        if place <= len(inputs):
            operand = (target, *inputs)[place]
            words += [operand, kernels.NUMBERS[operand.dtype], *steps[place]]
        else:
            words += [0] * kernels.E_OPERAND
    for place in range(2):
        number = numbers[place] if place < len(numbers) else 0
        words.append(int(number) if integers else bits_of(number))
    return Native(kernels.elementwise, words)


def bits_of(number: float) -> int:
    """A float64 as a word."""
    return struct.unpack("<q", struct.pack("<d", float(number)))[0]


def _is_whole(value: Any) -> bool:
    if isinstance(value, Operand):
        return not value.dtype.is_floating_point
    return isinstance(value, int)


def _compared(values: Sequence[Any]) -> torch.dtype:
    """The type to which torch rounds numbers that it compares with these."""
    dtypes = {value.dtype for value in values if isinstance(value, Operand) and value.shape}
    alone = {value.dtype for value in values if isinstance(value, Operand) and not value.shape}
    _need(len(dtypes) != 1 or alone <= dtypes)  # a single value of a wider type would have to be rounded, too
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= TYPES.keys() else torch.float32


def _constant(value: Any, dtype: torch.dtype) -> Operand:
    _need(isinstance(value, int | float))
    tensor = torch.tensor(value, dtype=dtype)
    return Operand(Memory(tensor.nbytes, tensor), tensor.dtype, (), (), 0)


def _zero(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    return _filled(0)(replace(operation, results=operation.changes), given, read)


def _filled(value: float | None) -> Callable[..., list[Native]]:
    """New memory, of `value` or the argument's."""

    def lower(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
        target, number = operation.results[0], given["fill_value"] if value is None else value
        dtype = torch.int64 if _is_whole(number) and _is_whole(target) else torch.float32
        constant = _constant(number, dtype)
        return [elementwise_call(None, dtype == torch.int64, target, [constant])] if target.numel else []

    return lower


def narrowed(operand: Operand, dim: int, start: int, size: int) -> Operand:
    """A part of it along a dimension."""
    shape = (*operand.shape[:dim], size, *operand.shape[dim + 1 :])
    return operand._replace(shape=shape, offset=operand.offset + start * operand.strides[dim])


def _cat(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    target = operation.results[0]
    dim, start, calls = given["dim"] % len(target.shape), 0, []
    for part in given["tensors"]:
        _need(len(part.shape) == len(target.shape))
        into = narrowed(target, dim, start, part.shape[dim])
        integers = not part.dtype.is_floating_point and not target.dtype.is_floating_point
        if part.numel:
            calls.append(elementwise_call(None, integers, into, [part]))
        start += part.shape[dim]
    return calls


def _stack(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    target = operation.results[0]
    dim, calls = given["dim"] % len(target.shape), []
    for place, part in enumerate(given["tensors"]):
        strides = [stride for axis, stride in enumerate(target.strides) if axis != dim]
        into = target._replace(
            shape=part.shape, strides=tuple(strides), offset=target.offset + place * target.strides[dim]
        )
        if part.numel:
            calls.append(elementwise_call(None, not part.dtype.is_floating_point, into, [part]))
    return calls


def _reduction(which: int) -> Callable[..., list[Native]]:
    def lower(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
        source, results = given["self"], operation.results
        dims = [given["dim"]] if isinstance(given.get("dim"), int) else given.get("dim") or []
        _need(source.dtype.is_floating_point and bool(source.numel) and bool(dims))
        reduced = {dim % len(source.shape) for dim in dims}
        if which == kernels.LARGEST_AT:
            return [reduce_call(kernels.LARGEST, source, None, results[0], reduced)]
        at = results[1] if len(results) == 2 and results[1].memory in read else None
        return [reduce_call(which, source, results[0], at, reduced)]

    return lower


def _softmax(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    source = given["self"]
    _need(source.dtype.is_floating_point and bool(source.numel))
    dim = given["dim"] % len(source.shape)
    return [reduce_call(kernels.SOFTMAX, source, operation.results[0], None, {dim})]


def reduce_call(which: int, source: Operand, result: Operand | None, at: Operand | None, reduced: set[int]) -> Native:
    """Over the dimensions `reduced`, which lie behind each other."""
    outer = [dim for dim in range(len(source.shape)) if dim not in reduced]
    inner = sorted(reduced)
    sizes, (source_steps,) = merged([source.shape[dim] for dim in inner], [[source.strides[dim] for dim in inner]], 1)
    targets = [each for each in (result, at) if each is not None]
    keeps = all(len(each.shape) == len(source.shape) for each in targets)
    strides = [[source.strides[dim] for dim in outer]]
    for each in targets:
        places = outer if keeps else range(len(outer))
        strides.append([each.strides[place] for place in places])
    walk, steps = merged([source.shape[dim] for dim in outer], strides, kernels.DIMENSIONS - 1)
    words: list[Any] = [which, *walk, sizes[0]]
    words += [source, kernels.NUMBERS[source.dtype], *steps[0], source_steps[0]]
    rest = iter(steps[1:])
    for target in (result, at):
        if target is None:
            words += [0] * kernels.R_OPERAND
        else:
            inner_step = target.strides[inner[-1]] if which == kernels.SOFTMAX else 0
            words += [target, kernels.NUMBERS[target.dtype], *next(rest), inner_step]
    return Native(kernels.reduce, words)


class _Walk(NamedTuple):
    """Of `shape`, with the strides of what is read, what is written, and the index."""

    shape: Sequence[int]
    source: Sequence[int]
    result: Sequence[int]
    places: Sequence[int]


def _by_index(
    walk: _Walk, source: Operand, result: Operand, index: Operand, steps: tuple[int, int], limit: int
) -> list[Native]:
    _need(index.dtype == torch.int64 and source.dtype == result.dtype and source.memory is not result.memory)
    if not math.prod(walk.shape):
        return []
    sizes, strides = merged(walk.shape, walk[1:], kernels.DIMENSIONS)
    operands = zip((source, result, index), strides, strict=True)
    words: list[Any] = [*sizes, *(word for operand, own in operands for word in (operand, *own))]
    return [Native(kernels.indexed, [*words, *steps, limit, source.dtype.itemsize, FAULT])]


def _without(strides: Sequence[int], dim: int) -> list[int]:
    return [0 if place == dim else stride for place, stride in enumerate(strides)]


def _along(index: Operand, dim: int, dimensions: int) -> list[int]:
    _need(len(index.shape) <= 1)
    return [(index.strides[0] if index.shape else 0) if place == dim else 0 for place in range(dimensions)]


def _embedding(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    weight, index, result = given["weight"], given["indices"], operation.results[0]
    walk = _Walk(result.shape, [*(0 for _ in index.shape), weight.strides[1]], result.strides, [*index.strides, 0])
    return _by_index(walk, weight, result, index, (weight.strides[0], 0), weight.shape[0])


def _index_select(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    source, index, result = given["self"], given["index"], operation.results[0]
    _need(bool(source.shape))
    dim = given["dim"] % len(source.shape)
    walk = _Walk(result.shape, _without(source.strides, dim), result.strides, _along(index, dim, len(source.shape)))
    return _by_index(walk, source, result, index, (source.strides[dim], 0), source.shape[dim])


def _gather(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    source, index, result = given["self"], given["index"], operation.results[0]
    _need(bool(source.shape))
    dim = given["dim"] % len(source.shape)
    walk = _Walk(index.shape, _without(source.strides, dim), result.strides, index.strides)
    return _by_index(walk, source, result, index, (source.strides[dim], 0), source.shape[dim])


def _index_copy(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    source, index, result = given["source"], given["index"], operation.changes[0]
    _need(bool(source.shape) and len(source.shape) == len(result.shape))
    dim = given["dim"] % len(source.shape)
    walk = _Walk(source.shape, source.strides, _without(result.strides, dim), _along(index, dim, len(source.shape)))
    return _by_index(walk, source, result, index, (0, result.strides[dim]), result.shape[dim])


def _product(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    """x W, and a bias; several at once for `bmm`."""
    biased = "mat1" in given
    x, weight, bias = given["mat1" if biased else "self"], given["mat2"], given["self"] if biased else None
    result = operation.results[0]
    if len(x.shape) == 2:
        x, weight, result = (_several(each) for each in (x, weight, result))
    (products, vectors, inputs), columns = x.shape, weight.shape[2]
    operands = [each for each in (x, weight, bias, result) if each is not None]
    _need(vectors <= MOST_VECTORS and min(products, vectors, inputs, columns) > 0)
    _need(weight.strides[1] == 1 or weight.strides[2] == 1)
    _need(all(each.strides[2] == 1 or each.shape[2] == 1 for each in (x, result)))
    _need({each.dtype for each in operands} <= {x.dtype} and x.dtype in TYPES)
    if bias is not None:
        _need(bias.shape == (columns,) and bias.strides == (1,) and given["beta"] == 1 and given["alpha"] == 1)
    words = [products, vectors, inputs, columns, x, *x.strides[:2], weight, *weight.strides, bias or 0]
    return [Native(dense.make_dense(TYPES[x.dtype])[0], [*words, result, *result.strides[:2]])]


def _several(operand: Operand) -> Operand:
    """A matrix as one of several."""
    return operand._replace(shape=(1, *operand.shape), strides=(0, *operand.strides))


def _layer_norm(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    source, (result, *rest), weight, bias = given["input"], operation.results, given["weight"], given["bias"]
    _need(source.dtype.is_floating_point and len(given["normalized_shape"]) == 1 and bool(source.numel))
    _need(not any(each.memory in read for each in rest))
    present = [each for each in (source, result) if each is not None]
    _need(all(each.strides[-1] == 1 for each in present))
    _need(all(each is None or each.strides == (1,) for each in (weight, bias)))
    sizes, strides = merged(source.shape[:-1], [source.strides[:-1], result.strides[:-1]], 2)
    words: list[Any] = [*sizes, source.shape[-1]]
    for each, own in zip((source, result), strides, strict=True):
        words += [each, kernels.NUMBERS[each.dtype], *own]
    for each in (weight, bias):
        words += [0, 0] if each is None else [each, kernels.NUMBERS[each.dtype]]
    return [Native(kernels.layer_norm, [*words, bits_of(given["eps"])])]


def _attention(operation: Operation, given: dict[str, Any], read: set[Memory]) -> list[Native]:
    query, key, value, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    result, rest = operation.results[0], operation.results[1:]
    (batch, heads, queries, width), keys = query.shape, key.shape[2]
    operands = (query, key, value, result)
    _need(given["dropout_p"] == 0 and not given["is_causal"] and not any(each.memory in read for each in rest))
    _need({each.dtype for each in operands} == {query.dtype} and query.dtype in TYPES and bool(keys))
    _need(key.shape[:2] == value.shape[:2] == (batch, heads) and queries <= MOST_VECTORS)
    _need(all(each.strides[3] == 1 or each.shape[3] == 1 for each in operands))
    words: list[Any] = [batch, heads, queries, keys, width, value.shape[3]]
    for operand in (query, key, value):
        words += [operand, *operand.strides]
    if mask is None:
        words += [0] * 5
    else:
        _need(mask.dtype in TYPES)
        words += [mask, *broadcast(mask, (batch, heads, queries, keys))]
    words += [result, *result.strides, 0 if mask is None else TYPES[mask.dtype]]
    scale = width**-0.5 if given["scale"] is None else given["scale"]
    return [Native(dense.make_dense(TYPES[query.dtype])[1], [*words, bits_of(scale)])]


_LOWERINGS: dict[str, Callable[[Operation, dict[str, Any], set[Memory]], list[Native]]] = {
    "zero_": _zero,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("full", "full_like", "new_full"), _filled(None)),
    "cat": _cat,
    "sum": _reduction(kernels.SUM),
    "mean": _reduction(kernels.MEAN),
    "amax": _reduction(kernels.LARGEST),
    "amin": _reduction(kernels.SMALLEST),
    "max": _reduction(kernels.LARGEST),
    "min": _reduction(kernels.SMALLEST),
    "argmax": _reduction(kernels.LARGEST_AT),
    "_softmax": _softmax,
    "embedding": _embedding,
    "index_select": _index_select,
    "gather": _gather,
    "index_copy_": _index_copy,
    "stack": _stack,
    "native_layer_norm": _layer_norm,
    "mm": _product,
    "bmm": _product,
    "addmm": _product,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
}
