"""More tokens than a fused product takes: matrices to float16, the vendor's matrix product, then the scales."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from qpalette.backends.cuda.compiler import launch, load_kernel
from qpalette.backends.cuda.decoder import COMMON_SOURCE, decoder_spec, entries, with_decoders
from qpalette.backends.cuda.layout import CHUNK, check_layout
from qpalette.backends.cuda.multiply import THREADS, device_limits
from qpalette.backends.cuda.rotate import TYPES, Rotated
from qpalette.core.records import TILE
from qpalette.runtime import PackedLinear

SOURCE = Path(__file__).with_name("unpack.cu").read_text()
RESCALE_SOURCE = COMMON_SOURCE + Path(__file__).with_name("rescale.cu").read_text()
RESCALE_MACROS = {"THREADS": 256, "EACH": 4}


def multiply_by_library(x: Rotated, members: Sequence[PackedLinear], dtype: torch.dtype) -> torch.Tensor:
    """[tokens, sum of out_features] of `dtype`: one product for all members. Rotated tokens have a norm below MOST_NORM
    and rows of W' are near unit variance, so no product passes float16."""
    product = x.values @ unpack(members).T
    tokens, rows = len(product), sum(member.out_features for member in members)
    y = torch.empty(tokens, rows, dtype=dtype, device=product.device)
    from_row, to_row = 0, 0
    for member in members:
        _rescale(product[:, from_row:], x.scales, member, y[:, to_row:])
        from_row += len(member.codes) * TILE
        to_row += member.out_features
    return y


def unpack(members: Sequence[PackedLinear]) -> torch.Tensor:
    """W' without its row scales, float16 [16 row tiles of all members, columns of all chunks], the columns in the order
    of `rotate` for batch None; codes are in the chunk layout. Raises UnsupportedError for another one."""
    check_layout(members)
    device, chunks = members[0].codes.device, members[0].codes.shape[1]
    limits = device_limits(device.index or 0)
    rows = TILE * sum(len(member.codes) for member in members)
    out = torch.empty(rows, chunks * CHUNK * TILE, dtype=torch.float16, device=device)
    first = 0
    for member in members:
        spec = decoder_spec(member.spec)
        assert spec is not None, "supports() said no"
        source = with_decoders(SOURCE, (spec,))
        macros = {"THREADS": THREADS, "TABLE_BYTES": limits.table_bytes}
        kernel = load_kernel(source, "unpack", macros, device.index or 0, limits.table_bytes)
        arguments = [
            ctypes.c_void_p(member.codes.data_ptr()),
            ctypes.c_void_p(entries(member.spec, device).data_ptr()),
            ctypes.c_int(len(member.codes)),
            ctypes.c_int(chunks),
            ctypes.c_uint32(spec.hash_unit(limits.table_bytes)),
            ctypes.c_void_p(out[first:].data_ptr()),
        ]
        stream = torch.cuda.current_stream(device).cuda_stream
        launch(kernel, stream, limits.multiprocessors, THREADS, limits.table_bytes, arguments)
        first += len(member.codes) * TILE
    return out


def _rescale(product: torch.Tensor, x_scales: torch.Tensor, member: PackedLinear, y: torch.Tensor) -> None:
    device = product.device
    kernel = load_kernel(RESCALE_SOURCE, "rescale", RESCALE_MACROS, device.index or 0)
    arguments = [
        ctypes.c_void_p(product.data_ptr()),
        ctypes.c_longlong(product.stride(0)),
        ctypes.c_void_p(x_scales.data_ptr()),
        ctypes.c_void_p(member.scales.data_ptr()),
        ctypes.c_int(member.out_features),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_longlong(y.stride(0)),
        ctypes.c_int(TYPES[y.dtype]),
    ]
    threads, each = RESCALE_MACROS["THREADS"], RESCALE_MACROS["EACH"]
    grid = (len(product), -(-member.out_features // (threads * each)))
    launch(kernel, torch.cuda.current_stream(device).cuda_stream, grid, threads, 0, arguments)
