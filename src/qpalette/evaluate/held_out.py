"""Which part of a text is held out: the same tokens in every command, however it cuts the text into windows.

What a plan is measured on, and what tuning stops by, must be new to calibration and tuning both, and the same mixture
as the rest of the text: its end is of one subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from itertools import count as naturals

from torch import Tensor

BLOCK = 2048  # tokens
EVERY = 8  # blocks, of which the last is held out
MOST = 8  # windows that are measured on


def usual(count: int) -> int:
    """How many are measured on where `count` windows are calibrated on."""
    return max(1, min(MOST, count // EVERY))


def split(windows: Sequence[Tensor], most: int) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to fit something to, and at most `most` that are new to it, from the whole of the text.

    `windows` follow each other in the text, int64 [length] each. One that shares a token with the last block of
    `EVERY` is held out: no other cut has that token to fit to. Of a text without such a block the last `most` windows
    are held out; a single window is both.
    """
    apart = _held_out([len(window) for window in windows], most)
    fitted = [window for window, held in zip(windows, apart, strict=True) if not held]
    held_out = [window for window, held in zip(windows, apart, strict=True) if held] or fitted
    chosen = min(most, len(held_out))
    return fitted, [held_out[(2 * index + 1) * len(held_out) // (2 * chosen)] for index in range(chosen)]


def windows_around(count: int, length: int, most: int) -> int:
    """How many windows of `length` tokens have `count` to fit something to, and at least one held out."""
    held, unit = 0, max(BLOCK, length)
    for number in naturals(1):
        held += _is_apart(number * length, length, unit)
        if number > count and number - (held or _ending(number, most)) >= count:
            return number
    raise AssertionError("a text without an end has an answer")


def _held_out(lengths: Sequence[int], most: int) -> list[bool]:
    unit = max(BLOCK, *lengths)
    apart = [_is_apart(end, length, unit) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    if any(apart):
        return apart
    rest = len(lengths) - _ending(len(lengths), most)
    return [index >= rest for index in range(len(lengths))]


def _is_apart(end: int, length: int, unit: int) -> bool:
    """Whether the `length` tokens before `end` touch the last block of `EVERY`, in blocks of `unit`."""
    first, last = (end - length) // unit, (end - 1) // unit
    return any(block % EVERY == EVERY - 1 for block in range(first, last + 1))


def _ending(count: int, most: int) -> int:
    """How many windows are held out of a text without such a block."""
    return min(most, count - 1)
