"""Timings of the products on this device, on random codes: the speed does not depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from qpalette.backends.cuda import multiply, teams
from qpalette.backends.cuda.backend import CudaBackend
from qpalette.backends.cuda.layout import to_chunks
from qpalette.backends.cuda.multiply import ProductLaunch
from qpalette.backends.cuda.product import CudaProduct, columns_of, most_fused_tokens
from qpalette.backends.cuda.rotate import RotationLaunch, padded_columns, rotate
from qpalette.backends.cuda.segments import device_limits
from qpalette.backends.cuda.timing import cold_copies, graph_seconds
from qpalette.codes import parse_spec
from qpalette.core.records import tiles_of
from qpalette.rotate import full_rotation
from qpalette.runtime import PackedLinear

MOST_COPIES = 60
_BACKEND = CudaBackend()
Part = tuple[str, int, int]  # spec, out-features, in-features


def random_member(spec: str, rows: int, columns: int, device: torch.device) -> PackedLinear:
    """A matrix of random codes, laid out for the kernels; all of `columns` inputs share signs and rotation."""
    words = parse_spec(spec).words_per_tile
    shape = (tiles_of(rows), tiles_of(columns), words)
    codes = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=device).to(torch.int32)
    scales = torch.full((rows,), 0.02, device=device).half().view(torch.int16)
    signs = torch.zeros(-(-columns // 8), dtype=torch.uint8, device=device)
    rotation = full_rotation(columns).name
    return PackedLinear(to_chunks(codes), scales, signs, spec, rotation, rows, columns, _BACKEND.layout)


def launch_seconds(parts: Sequence[Part], batch: int, device: torch.device, with_rotation: bool = False) -> float:
    """Seconds of one fused launch over `parts`, which read one input, cold weights; the rotation of the input apart, or
    counted, as it is where teams multiply, whose sums it sets to zero, and where cuBLAS multiplies decoded matrices."""
    members = [random_member(spec, rows, columns, device) for spec, rows, columns in parts]
    size = sum(4 * member.codes.numel() for member in members)
    copies = [members]
    for _ in range(min(MOST_COPIES, cold_copies(size)) - 1):
        copies.append([_copy(member) for member in members])
    x = torch.randn(batch, parts[0][2], dtype=torch.float16, device=device)
    limits = device_limits(device.index or 0)
    if with_rotation or batch > most_fused_tokens(limits) or teams.serves(batch, limits):
        return graph_seconds([partial(CudaProduct(these), x) for these in copies])
    _, columns = multiply.columns_of(batch)
    rotated = rotate(x, members[0].diagonal, members[0].rotation, columns)
    width = sum(member.out_features for member in members)
    y = x.new_empty(batch, width)

    def start(launch: ProductLaunch) -> None:
        launch.start(rotated.values.data_ptr(), rotated.scales.data_ptr(), y.data_ptr(), _stream(device))

    return graph_seconds([partial(start, ProductLaunch(these, batch, x.dtype, 0, width)) for these in copies])


def plain_seconds(rows: int, columns: int, batch: int, device: torch.device) -> float:
    """Seconds of torch's product of `batch` tokens with a float16 matrix, cold weights."""
    x = torch.randn(batch, columns, dtype=torch.float16, device=device)
    weights = [
        torch.randn(rows, columns, dtype=torch.float16, device=device) for _ in range(cold_copies(2 * rows * columns))
    ]
    return graph_seconds([partial(torch.nn.functional.linear, x, weight) for weight in weights])


def rotation_seconds(columns: int, batch: int, device: torch.device) -> float:
    """Seconds to rotate `batch` tokens of `columns` values, as their product reads them."""
    member = random_member("nuq-2", 16, columns, device)
    width: int | None
    limits = device_limits(device.index or 0)
    lots, width = columns_of(batch, limits)
    if batch > most_fused_tokens(limits):
        lots, width = batch, None
    cores = width is not None and teams.serves(batch, limits)
    launch = RotationLaunch(member.rotation, member.diagonal, columns, batch, width, torch.float16, cores=cores)
    inputs = [torch.randn(batch, columns, dtype=torch.float16, device=device) for _ in range(20)]
    values = torch.empty(lots * (width or 1), padded_columns(columns), dtype=torch.float16, device=device)
    scales = torch.empty(len(values), dtype=torch.float32, device=device)

    def start(x: torch.Tensor) -> None:
        launch.start(batch, x.data_ptr(), values.data_ptr(), scales.data_ptr(), _stream(device))

    return graph_seconds([partial(start, x) for x in inputs])


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _copy(member: PackedLinear) -> PackedLinear:
    return PackedLinear(
        member.codes.clone(),
        member.scales,
        member.diagonal,
        member.spec,
        member.rotation,
        member.out_features,
        member.in_features,
        member.layout,
    )
