"""How experts are named: every expert's linear has a name of its own, wherever its weight is stored."""

from __future__ import annotations

import re

# One expert's linear, and what an expert computes first, in the order in which its activation takes them, and last.
EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<index>\d+)\.(?P<leaf>\w+)")
FIRST = (("gate_proj", "up_proj"), ("w1", "w3"), ("gate_up_proj",), ("up_proj",))
DOWN = ("down_proj", "w2")


def expert_linear(holder: str, index: int, leaf: str) -> str:
    """The name of a linear whose weight is part of a stack: `holder` is the module with the stack, or its name in a
    checkpoint."""
    inside = holder if re.search(r"\bexperts$", holder) else f"{holder}.experts"
    return f"{inside}.{index}.{leaf}"
