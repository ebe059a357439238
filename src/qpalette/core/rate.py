"""Rates: stored bits per weight, kept as exact fractions (0.125 steps never round)."""

from __future__ import annotations

import re
from fractions import Fraction

from qpalette.core.errors import SpecError

_DECIMAL = re.compile(r"[0-9]{1,3}(\.[0-9]{1,9})?")


def parse_rate(text: str) -> Fraction:
    """`"3.25"` -> 13/4, exactly. Raises SpecError when `text` is not a plain decimal number."""
    if not _DECIMAL.fullmatch(text):
        raise SpecError(f"'{text[:60]}' is not a rate: write bits per weight as a decimal, such as 3.25")
    return Fraction(text)


def format_rate(rate: Fraction) -> str:
    """13/4 -> `"3.25"`, 4 -> `"4"`. Every multiple of 1/8 has a finite decimal."""
    return f"{float(rate):g}"
