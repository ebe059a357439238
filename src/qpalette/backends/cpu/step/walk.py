"""How several tensors are walked through together: sizes and strides, in as few dimensions as will do."""

from __future__ import annotations

from collections.abc import Sequence

from qpalette.backends.cpu.step.record import Operand


def broadcast(operand: Operand, shape: Sequence[int]) -> list[int]:
    """Its strides, as if it had `shape`."""
    missing = len(shape) - len(operand.shape)
    own = zip(operand.shape, operand.strides, strict=True)
    return [0] * missing + [0 if size == 1 else stride for size, stride in own]


def merged(
    sizes: Sequence[int], strides: Sequence[Sequence[int]], dimensions: int
) -> tuple[list[int], list[list[int]]]:
    """Sizes and, for each tensor, strides of the same walk, `dimensions` of each: what lies behind each other in every
    tensor is one dimension. Raises ValueError where more are left."""
    kept: list[tuple[int, list[int]]] = []
    for size, *steps in zip(sizes, *strides, strict=True):
        if size == 1:
            continue
        if kept and all(outer == inner * size for outer, inner in zip(kept[-1][1], steps, strict=True)):
            kept[-1] = (kept[-1][0] * size, steps)
        else:
            kept.append((size, steps))
    if len(kept) > dimensions:
        raise ValueError("too many dimensions")
    kept = [(1, [0] * len(strides))] * (dimensions - len(kept)) + kept
    return [size for size, _ in kept], [[steps[tensor] for _, steps in kept] for tensor in range(len(strides))]
