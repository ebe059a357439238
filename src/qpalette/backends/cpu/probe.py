"""Timings of the products on this processor, on random codes: the speed does not depend on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from qpalette.backends.cpu.backend import CpuBackend
from qpalette.backends.cpu.layout import to_layout
from qpalette.backends.cpu.product import CpuProduct
from qpalette.codes import parse_spec
from qpalette.core.records import tiles_of
from qpalette.rotate import full_rotation
from qpalette.runtime import PackedLinear

COLD_BYTES = 128e6  # of different weights in rotation: several times the last cache that a few cores have
MOST_COPIES = 60
REPEATS = 5  # of all copies
Part = tuple[str, int, int]  # spec, out-features, in-features


def launch_seconds(parts: Sequence[Part], batch: int) -> float:
    """Seconds of one product with `parts`, which read one float32 input, rotation included; cold weights."""
    members = [_random_member(*part) for part in parts]
    copies = _copies(sum(member.codes.nbytes for member in members))
    products = [CpuProduct(members)]
    for _ in range(copies - 1):
        products.append(CpuProduct([member.with_(codes=member.codes.clone()) for member in members]))
    x = torch.randn(batch, parts[0][2])
    return _median_seconds([partial(product, x) for product in products])


def plain_seconds(rows: int, columns: int, batch: int) -> float:
    """Seconds of torch's product of `batch` tokens with a float32 matrix, cold weights."""
    x = torch.randn(batch, columns)
    weights = [torch.randn(rows, columns) for _ in range(_copies(4 * rows * columns))]
    return _median_seconds([partial(torch.nn.functional.linear, x, weight) for weight in weights])


def _random_member(spec: str, rows: int, columns: int) -> PackedLinear:
    shape = (tiles_of(rows), tiles_of(columns), parse_spec(spec).words_per_tile)
    codes = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
    scales = torch.full((rows,), 0.02).half().view(torch.int16)
    signs = torch.zeros(-(-columns // 8), dtype=torch.uint8)
    rotation = full_rotation(columns).name
    return PackedLinear(to_layout(codes, spec), scales, signs, spec, rotation, rows, columns, CpuBackend.layout)


def _copies(size: int) -> int:
    return min(MOST_COPIES, max(1, -(-int(COLD_BYTES) // size)))


def _median_seconds(products: Sequence[Callable[[], object]]) -> float:
    """Of one product, each in its turn; the first, which compiles, apart."""
    products[0]()
    seconds = []
    for _ in range(REPEATS):
        for product in products:
            start = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
