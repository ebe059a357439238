"""What repeats over layers."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def linear_kind(name: str) -> str:
    """ "model.layers.12.mlp.down_proj" -> "model.layers.*.mlp.down_proj"."""
    return _NUMBER.sub("*", name)
