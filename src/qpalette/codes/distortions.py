"""Distortions of the trellis quantizers, each member by itself: codebooks change between rates, and a figure between
two others would not know it. `benchmarks/palette_distortions.py` measures them and writes the table.

Mean squared error over mean square on N(0, 1). All are measured at L = 12, 16 and 18, and whole bits at L = 20. The
others at L = 20 are estimated (`estimated_specs`): the figure of L = 18, times what L = 20 keeps of it at the nearest
measured rates of the same codebook. The sampling error of one sigma is at most 0.25 % at L = 12 and 16, 0.4 % at
L = 18, and about 0.5 % at L = 20, 1 % above 5 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

DISTORTIONS = Path(__file__).with_name("distortions.json")


@cache
def distortions() -> Mapping[str, float]:
    """Spec -> distortion, for every memory of every trellis family."""
    table = _table()
    return table["measured"] | table["estimated"]


def estimated_specs() -> frozenset[str]:
    """Those that were not measured themselves."""
    return frozenset(_table()["estimated"])


@cache
def _table() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(DISTORTIONS.read_text(encoding="utf-8"))
    return found
