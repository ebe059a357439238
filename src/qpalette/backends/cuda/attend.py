"""Attention of one new token over a cache, in one launch, on devices that have clusters of blocks."""

from __future__ import annotations

import ctypes
from math import e, log2
from pathlib import Path

import torch

from qpalette.backends.cuda.compiler import KernelLaunch, compiler_is_installed, load_kernel
from qpalette.backends.cuda.decoder import COMMON_SOURCE
from qpalette.backends.cuda.rotate import TYPES
from qpalette.backends.cuda.segments import device_limits

SOURCE = COMMON_SOURCE + Path(__file__).with_name("attend.cu").read_text(encoding="utf-8")
SPLITS = 8  # blocks of a cluster: as many as every device with clusters has
MOST_DIM = 256
MOST_GROUP = 8  # queries that share a key: the columns of a matrix instruction
VECTOR = 8  # halves that a lane loads at once
_STRIDES = (
    *("query_batch", "query_head", "key_batch", "key_head", "key_row"),
    *("value_batch", "value_head", "value_row", "mask_batch"),
)


class Problem(ctypes.Structure):
    """As in attend.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "out")),
        *((name, ctypes.c_longlong) for name in _STRIDES),
        ("length", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


def warps_of(dim: int, blocks: int, multiprocessors: int) -> int:
    """Of a block: as many as the registers are enough for; few where several blocks share a multiprocessor."""
    if blocks > multiprocessors:
        return 4
    return 8 if dim > 128 else 12


def attends(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether `attend` takes these; it may be asked while torch.compile traces."""
    if query.device.type != "cuda" or not _has_clusters(query.device.index or 0):
        return False
    (batch, heads, tokens, dim), key_heads = query.shape, key.shape[1]
    vectors = all(
        tensor.stride(3) == 1 and all(stride % VECTOR == 0 for stride in tensor.stride()[:3])
        for tensor in (query, key, value)
    )
    return (
        vectors
        and key.dtype == value.dtype == query.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and tokens == 1
        and key.shape == value.shape
        and dim % 64 == 0
        and dim <= MOST_DIM
        and heads % key_heads == 0
        and heads // key_heads <= MOST_GROUP
        and mask.dtype == torch.bool
        and mask.shape[1:] == (1, 1, key.shape[2])
        and mask.shape[0] in (1, batch)
        and mask.stride(3) == 1
    )


@torch.compiler.assume_constant_result
def _has_clusters(device: int) -> bool:
    return torch.version.hip is None and compiler_is_installed() and device_limits(device).capability >= (9, 0)


@torch.library.custom_op("qpalette::attend", mutates_args=(), device_types="cuda")
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale q k, where the mask is true) v: query [B, H, 1, D], key and value [B, H / G, L, D], mask bool
    [B or 1, 1, 1, L] -> [B, 1, H, D], contiguous. float16 or bfloat16; sums in float32, in the same order on every run.

    A query without a key gets zeros. What `attends` refuses must not come here.
    """
    (batch, heads, _, dim), key_heads = query.shape, key.shape[1]
    # torch.compile cannot be asked where a tensor begins, so `attends` is not.
    query, key, value = (tensor if _begins_with_a_vector(tensor) else tensor.clone() for tensor in (query, key, value))
    out = query.new_empty(batch, 1, heads, dim)
    strides = (
        *(query.stride(0), query.stride(1), *key.stride()[:3]),
        *(*value.stride()[:3], mask.stride(0) if mask.shape[0] > 1 else 0),
    )
    problem = Problem(
        *(tensor.data_ptr() for tensor in (query, key, value, mask, out)), *strides, key.shape[2], scale * log2(e)
    )
    group, device = heads // key_heads, query.device.index or 0
    limits = device_limits(device)
    warps = warps_of(dim, SPLITS * key_heads * batch, limits.multiprocessors)
    macros = {"WARPS": warps, "DIM": dim, "GROUP": group, "TYPE": TYPES[query.dtype]}
    shared_bytes = (warps + 1) * 4 * (16 + group * (dim + 4))
    with torch.cuda.device(device):
        kernel = load_kernel(SOURCE, "attend", macros, device, limits.shared_bytes)
        stream = torch.cuda.current_stream(device).cuda_stream
        KernelLaunch(kernel, (SPLITS, key_heads, batch), 32 * warps, shared_bytes, [problem], overlap=True).start(
            stream
        )
    return out


def _begins_with_a_vector(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % (VECTOR * tensor.element_size()) == 0


@attend.register_fake
def _attended_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    batch, heads, _, dim = query.shape
    return query.new_empty(batch, 1, heads, dim)
