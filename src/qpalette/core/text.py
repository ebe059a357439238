"""Figures as people read them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """98362432 -> "98.4 MB"."""
    return _with_prefix(nbytes, "B")


def speed(weights_per_second: float) -> str:
    """2.5e6 -> "2.5 Mweights/s"."""
    return _with_prefix(weights_per_second, "weights/s")


def count(number: int) -> str:
    """106168320 -> "106.2 M"."""
    return _with_prefix(number, "").rstrip()


def first_line(error: object) -> str:
    """What an error of another's code says, as part of one line: its first line, and what that announces."""
    said, *rest = str(error).strip().splitlines() or [""]
    for line in rest:
        if not said.endswith(":"):
            break
        said = f"{said} {line.strip()}"
    return said


def _with_prefix(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if value < 1000 or prefix == "G":
            digits = 0 if value == int(value) and not prefix else 1
            return f"{value:.{digits}f} {prefix}{unit}"
        value /= 1000
    raise AssertionError("the loop ends at G")
