"""The one check that every operation of every backend stands behind: a wrong operand is an error, never an answer."""

from __future__ import annotations

from functools import lru_cache

import torch

from qpalette.codes import parse_spec
from qpalette.core.errors import InputError
from qpalette.core.records import tiles_of
from qpalette.runtime.contract import TILES, PackedLinear

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_packed(packed: PackedLinear) -> None:
    """Raises InputError when the tensors of a packed matrix are not of one device, or of another type or shape than its
    sizes and its spec say. The values are not read."""
    codes, scales, diagonal = packed.codes, packed.scales, packed.diagonal
    rows, columns = packed.out_features, packed.in_features
    if not codes.device == scales.device == diagonal.device:
        raise InputError(
            f"a packed matrix has its codes on {codes.device}, its scales on {scales.device} and its diagonal on "
            f"{diagonal.device}: move it as a whole"
        )
    if codes.dtype != torch.int32:
        raise InputError(f"codes are int32, got {codes.dtype}")
    if packed.layout == TILES and codes.shape != (shape := _stored_shape(packed.spec, rows, columns)):
        raise InputError(f"codes of {rows} x {columns} in {packed.spec} are {list(shape)}, got {list(codes.shape)}")
    if scales.dtype != torch.int16 or scales.shape != (rows,):
        raise InputError(f"the scales of {rows} rows are int16 [{rows}], got {_described(scales)}")
    packed_signs = diagonal.dtype == torch.uint8 and diagonal.shape == (-(-columns // 8),)
    if not packed_signs and (diagonal.dtype != torch.int16 or diagonal.shape != (columns,)):
        raise InputError(
            f"the diagonal of {columns} inputs is uint8 [{-(-columns // 8)}] (signs) or int16 [{columns}] (float16), "
            f"got {_described(diagonal)}"
        )


@lru_cache(maxsize=4096)
def _stored_shape(spec: str, rows: int, columns: int) -> torch.Size:
    return torch.Size((tiles_of(rows), tiles_of(columns), parse_spec(spec).words_per_tile))


def check_vectors(x: torch.Tensor, features: int, device: torch.device) -> None:
    """Raises InputError unless x is [..., features] of a floating type on `device`."""
    if x.dim() == 0 or x.shape[-1] != features:
        raise InputError(f"a packed matrix of {features} inputs cannot take a tensor of shape {list(x.shape)}")
    if x.device != device:
        raise InputError(f"the input is on {x.device}, the packed matrix on {device}: move one of them")
    if x.dtype not in FLOATS:
        raise InputError(f"a packed matrix takes float16, bfloat16, float32 or float64, got {x.dtype}")


def check_routes(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
    """Raises InputError unless index is int32 or int64 and weights floating, both [tokens, k] on the device of x
    [tokens, features]. The values are not read: an index that is no expert's stands for none."""
    if x.dim() != 2 or index.dim() != 2 or index.shape != weights.shape or len(index) != len(x):
        shapes = ", ".join(str(list(each.shape)) for each in (x, index, weights))
        raise InputError(f"experts take x [tokens, features], index and weights [tokens, k]; got {shapes}")
    if index.dtype not in (torch.int32, torch.int64) or weights.dtype not in FLOATS:
        raise InputError(f"experts take an integer index and floating weights, got {index.dtype} and {weights.dtype}")
    if not x.device == index.device == weights.device:
        raise InputError(
            f"x is on {x.device}, index on {index.device}, weights on {weights.device}: move them together"
        )


def check_ids(ids: torch.Tensor, rows: int) -> None:
    """Ids of rows are integers from 0 to rows - 1. Raises InputError for another type, and IndexError as torch does for
    a value out of range on the CPU; elsewhere the device asserts it, so that nobody waits and graphs can hold it.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"ids of rows are int32 or int64, got {ids.dtype}")
    within = (ids >= 0) & (ids < rows)
    if ids.device.type != "cpu":
        torch._assert_async(within.all(), "an id is out of the range of the packed embedding")
    elif not bool(within.all()):
        raise IndexError(f"id {int(ids[~within].flatten()[0])} is out of range for a packed embedding of {rows} rows")


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
