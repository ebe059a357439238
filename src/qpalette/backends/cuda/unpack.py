"""Packed matrices to float16 on a CUDA device."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from qpalette.backends.cuda.decoder import SOURCE as DECODER_SOURCE
from qpalette.backends.cuda.decoder import decoder_spec, entries
from qpalette.backends.cuda.layout import CHUNK
from qpalette.backends.cuda.multiply import THREADS, device_limits
from qpalette.core.records import TILE
from qpalette.kernels import PackedLinear
from qpalette.kernels.nvrtc import launch, load_kernel

SOURCE = Path(__file__).with_name("unpack.cu").read_text()


def unpack(packed: PackedLinear) -> torch.Tensor:
    """W' without its row scales, float16 [16 row tiles, columns of all chunks]; codes are in the chunk layout."""
    spec = decoder_spec(packed.spec)
    assert spec is not None, "supports() said no"
    device = packed.codes.device
    limits = device_limits(device.index or 0)
    rows, chunks = packed.codes.shape[:2]
    out = torch.empty(rows * TILE, chunks * CHUNK * TILE, dtype=torch.float16, device=device)
    source = f"#define DECODERS {spec.type_name}\n{DECODER_SOURCE}\n{SOURCE}"
    macros = {"THREADS": THREADS, "TABLE_BYTES": limits.table_bytes}
    kernel = load_kernel(source, "unpack", macros, device.index or 0, limits.table_bytes)
    arguments = [
        ctypes.c_void_p(packed.codes.data_ptr()),
        ctypes.c_void_p(entries(packed.spec, device).data_ptr()),
        ctypes.c_int(rows),
        ctypes.c_int(chunks),
        ctypes.c_uint32(spec.hash_unit(limits.table_bytes)),
        ctypes.c_void_p(out.data_ptr()),
    ]
    stream = torch.cuda.current_stream(device).cuda_stream
    launch(kernel, stream, limits.multiprocessors, THREADS, limits.table_bytes, arguments)
    return out
