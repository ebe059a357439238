"""Packed matrices cut among vLLM's ranks, and the ways of their tensors into its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.parameter import Parameter
from vllm.config import get_current_vllm_config

from qpalette.core.errors import ArtifactError, UnsupportedError
from qpalette.core.records import TILE, LinearRecord
from qpalette.formats.packed import METHOD
from qpalette.formats.parts import COLUMNS, PARTS, ROWS, Axis
from qpalette.rotate import Rotation
from qpalette.runtime import select

WEIGHT = "weight"


@dataclass(frozen=True)
class Share:
    """What one rank holds of a linear: some of its rows, and a range of its columns."""

    rows: tuple[tuple[int, int], ...]  # (first, count), one after the other
    column: int
    columns: int

    @property
    def out_features(self) -> int:
        return sum(count for _, count in self.rows)

    def of_rows(self, tensor: torch.Tensor, dim: int, unit: int) -> torch.Tensor:
        """Those rows along `dim` of `tensor`, which holds `unit` rows in one; what lies beyond its end is left out."""
        size = tensor.shape[dim]
        ends = [(first // unit, min(size, -(-(first + count) // unit))) for first, count in self.rows]
        pieces = [tensor.narrow(dim, min(start, end), max(0, end - start)) for start, end in ends]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def of_columns(self, tensor: torch.Tensor, dim: int, unit: int) -> torch.Tensor:
        """Those columns along `dim`, which holds `unit` columns in one."""
        end = -(-(self.column + self.columns) // unit)
        return tensor.narrow(dim, self.column // unit, end - self.column // unit)

    def record_of(self, name: str, record: LinearRecord) -> LinearRecord:
        """What is held, as a matrix of its own. Raises as `check`."""
        self.check(name, record)
        return replace(record, out_features=self.out_features, in_features=self.columns)

    def check(self, name: str, record: LinearRecord) -> None:
        """Raises UnsupportedError when the share does not consist of whole tiles and whole blocks of the rotation."""
        whole_rows = self.rows == ((0, self.out_features),) and self.out_features >= record.out_features
        if not whole_rows and any(number % TILE for rows in self.rows for number in rows):
            raise UnsupportedError(
                f"{name}: a rank's {self.out_features} of {record.out_features} rows are not whole tiles of {TILE}; "
                "use a smaller tensor_parallel_size"
            )
        if self.columns == record.in_features:
            return
        block = Rotation.parse(record.rotation, record.in_features).block
        if self.columns % block or self.columns % TILE:
            raise UnsupportedError(
                f"{name}: tensor parallelism gives each rank {self.columns} of {record.in_features} inputs, which "
                f"rotation '{record.rotation}' mixes in blocks of {block}; use tensor_parallel_size=1, or quantize "
                f"with --rotation block-{largest_block(self.columns)}"
            )


def largest_block(columns: int) -> int:
    """The largest power of two that divides `columns`."""
    return columns & -columns


class Door(Parameter):
    """Holds nothing: vLLM finds tensors by the parameters' names, and this one passes them to the parts."""

    def __new__(cls, load: Callable[..., Any], dtype: torch.dtype) -> Door:
        return super().__new__(cls, torch.empty(0, dtype=dtype), requires_grad=False)

    def __init__(self, load: Callable[..., Any], dtype: torch.dtype) -> None:
        self.weight_loader = load


_AXES = {part.suffix: part.axes for part in PARTS} | {WEIGHT: (Axis(ROWS), Axis(COLUMNS))}


def cut(suffix: str, loaded: torch.Tensor, share: Share) -> torch.Tensor:
    """This rank's share of a stored tensor."""
    for dim, axis in enumerate(_AXES[suffix]):
        if axis.over == ROWS:
            loaded = share.of_rows(loaded, dim, axis.unit)
        elif axis.over == COLUMNS:
            loaded = share.of_columns(loaded, dim, axis.unit)
    return loaded


def copy_into(name: str, target: torch.Tensor, source: torch.Tensor) -> None:
    """Rows that the source lacks stay zero: they are vLLM's padding of the vocabulary."""
    if (
        source.shape[1:] != target.shape[1:]
        or len(source) > len(target)
        or source.dtype.is_floating_point != target.dtype.is_floating_point
    ):
        raise ArtifactError(f"tensor '{name}' must be {target.dtype} {list(target.shape)}, got {list(source.shape)}")
    target[: len(source)].copy_(source)


def loads_dummies() -> bool:
    """Whether the model that is being built gets no weights from files."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def add_to_compile_cache_key(specs: set[str]) -> None:
    """Compiled graphs hold the codes' layout as a constant, and vLLM loads cached ones without their guards."""
    config = get_current_vllm_config()
    device = torch.get_default_device() if config.device_config is None else torch.device(config.device_config.device)
    layouts = {spec: select("linear", spec, device).layout for spec in specs}
    if isinstance(config.additional_config, dict):
        config.additional_config.setdefault(METHOD, {}).update(layouts)
