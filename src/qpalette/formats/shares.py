"""How much of a stored model is packed, from its headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qpalette.core.records import LinearRecord
from qpalette.formats.parts import is_part
from qpalette.models.multiplied import Shares, shares_of
from qpalette.storage import TensorInfo


def stored_shares(
    config: Mapping[str, Any], records: Mapping[str, LinearRecord], infos: Iterable[TensorInfo]
) -> Shares:
    """Of a quantized model, or one that is to be written: `infos` are all of its tensors."""
    kept = {info.name: info.shape for info in infos if not is_part(info.name) and info.dtype.is_floating_point}
    return shares_of(config, {name: record.weights for name, record in records.items()}, kept)
