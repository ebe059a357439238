"""Which rotation suits a dimension: the user's option, turned into factors."""

from __future__ import annotations

import re

from qpalette.core.errors import SpecError
from qpalette.rotate.factor import Factor
from qpalette.rotate.hadamard import MAX_ORDER, is_hadamard_order, is_power_of_two
from qpalette.rotate.rotation import Rotation


def full_rotation(dim: int) -> Rotation:
    """One block over all `dim` >= 2 inputs; for dim = 2^p * m with m odd:

    - m = 1: h{dim};
    - else the smallest Hadamard order m * 2^j <= 1024 that divides dim, with a power of two for the rest: h36xh16;
    - else a cosine transform of the odd part: c107xh128.

    Raises SpecError when `dim` is below 2.
    """
    if dim < 2:
        raise SpecError(f"{dim} inputs cannot be rotated: a rotation mixes at least 2")
    power = dim & -dim
    odd = dim // power
    if odd == 1:
        return Rotation((Factor("h", dim),), dim)
    for twos in (1 << j for j in range(power.bit_length())):
        if odd * twos <= MAX_ORDER and is_hadamard_order(odd * twos):
            return Rotation((Factor("h", odd * twos), *_power_of_two(power // twos)), dim)
    return Rotation((Factor("c", odd), *_power_of_two(power)), dim)


def block_rotation(dim: int, block: int | None = None) -> Rotation:
    """Hadamard blocks of `block` inputs, a power of two; by default the largest that divides `dim`.

    Raises SpecError when `dim` is odd, or `block` is no power of two of at least 2 or does not divide `dim`.
    """
    largest = dim & -dim if dim > 0 else 0
    if largest < 2:
        raise SpecError(f"{dim} inputs cannot be cut into blocks of a power of two: use the full rotation")
    if block is None:
        block = largest
    if block < 2 or not is_power_of_two(block):
        raise SpecError(f"a rotation block must be a power of two of at least 2, got {block}")
    if dim % block:
        raise SpecError(
            f"a rotation block of {block} does not divide {dim} inputs: "
            f"use block-{largest}, the largest that does, or the full rotation"
        )
    return Rotation((Factor("h", block),), dim)


def rotation_for(dim: int, kind: str) -> Rotation:
    """The rotation of `dim` inputs that the user's option asks for: "full", "block" or "block-64".

    Raises SpecError on any other option, and as `full_rotation` and `block_rotation` do.
    """
    if kind == "full":
        return full_rotation(dim)
    if kind == "block":
        return block_rotation(dim)
    match = re.fullmatch(r"block-([1-9][0-9]{0,8})", kind)
    if match is None:
        raise SpecError(f"'{kind[:60]}' is not a rotation option: use full, block, or block-N such as block-64")
    return block_rotation(dim, int(match[1]))


def _power_of_two(order: int) -> tuple[Factor, ...]:
    return (Factor("h", order),) if order > 1 else ()
