"""Fused products beside cuBLAS and the packages that are installed, on a GPU, in one run: microseconds per launch.

    python benchmarks/gemv.py

Shapes are those of a Llama-3.1-8B layer; "layer" is their sum, rotations apart. Graph replay, weights out of the cache.
"read" is the time that a kernel takes which only reads the bytes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from report import report
from rich.console import Console

from qpalette.backends.cuda import product, rotate
from qpalette.backends.cuda.compiler import compile_cubin, load_kernel
from qpalette.backends.cuda.decoder import decoder_spec
from qpalette.backends.cuda.multiply import kernel_macros, source_for
from qpalette.backends.cuda.probe import launch_seconds, plain_seconds, rotation_seconds
from qpalette.backends.cuda.segments import device_limits
from qpalette.backends.cuda.timing import cold_copies, graph_seconds
from qpalette.core.cache import CACHE

LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate/up": (28672, 4096), "down": (4096, 14336)}
SMALL = {"1024x4096": (1024, 4096)}
SPECS = ("tcq2-2", "tcq2-3", "tcq2-3.25", "tcq2-4", "tcq-3.25", "tcq-4", "vq-3", "vq-4", "nuq-3")
BATCHES = (1, 8, 16)
ROTATION_BLOCKS = (4, 14)
CROSSOVER = (1, 16, 32, 64, 96, 128, 256)


def cublas(rows: int, columns: int, batch: int) -> float:
    return plain_seconds(rows, columns, batch, torch.device("cuda"))


def tinygemm(rows: int, columns: int, batch: int) -> float:
    """torch's int4 product, groups of 128, bfloat16."""
    x = torch.randn(batch, columns, dtype=torch.bfloat16, device="cuda")
    copies = []
    for _ in range(cold_copies(rows * columns // 2)):
        plain = torch.randint(0, 256, (rows, columns // 2), device="cuda").to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(plain, 8)
        copies.append((packed, torch.rand(columns // 128, rows, 2, dtype=torch.bfloat16, device="cuda")))
    return graph_seconds([lambda w=w, s=s: torch.ops.aten._weight_int4pack_mm(x, w, 128, s) for w, s in copies])


def bitsandbytes(rows: int, columns: int, batch: int) -> float:
    """NF4, blocks of 64."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import quantize_4bit

    x = torch.randn(batch, columns, dtype=torch.float16, device="cuda")
    copies = []
    for _ in range(cold_copies(rows * columns // 2)):
        weight = torch.randn(rows, columns, dtype=torch.float16, device="cuda")
        copies.append(quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    return graph_seconds([lambda w=w, s=s: bnb.matmul_4bit(x, w.t(), quant_state=s) for w, s in copies])


def gemlite(rows: int, columns: int, batch: int) -> float:
    """Four bits, groups of 64."""
    from gemlite.core import DType, GemLiteLinear

    x = torch.randn(batch, columns, dtype=torch.float16, device="cuda")
    copies = []
    for _ in range(cold_copies(rows * columns // 2)):
        layer = GemLiteLinear(4, 64, columns, rows, input_dtype=DType.FP16, output_dtype=DType.FP16)
        codes = torch.randint(0, 16, (rows, columns), device="cuda").to(torch.uint8)
        scales = torch.rand(rows * columns // 64, 1, dtype=torch.float16, device="cuda")
        layer.pack(codes, scales, torch.full_like(scales, 8), None)
        copies.append(layer)
    return graph_seconds([lambda layer=layer: layer(x) for layer in copies])


PEERS = {"cuBLAS fp16": cublas, "tinygemm int4 g128": tinygemm}
SLOW_PEERS = {"bitsandbytes nf4": bitsandbytes, "gemlite int4 g64": gemlite}

READ = r"""
extern "C" __global__ void read(const uint4 *data, long long count, unsigned *out) {
    unsigned sum = 0;
    for (long long i = blockIdx.x * 1024ll + threadIdx.x; i < count; i += gridDim.x * 1024ll) {
        unsigned a, b, c, d;
        asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(data + i));
        sum += a ^ b ^ c ^ d;
    }
    if (sum == 0x12345678u) *out = sum;
}
"""


def read_only(size: int) -> float:
    """Seconds to read `size` bytes once, 16 at a time."""
    import ctypes

    from qpalette.backends.cuda.compiler import KernelLaunch

    kernel = load_kernel(READ, "read", {}, 0)
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    copies = [torch.zeros(size // 16 * 16, dtype=torch.uint8, device="cuda") for _ in range(min(60, cold_copies(size)))]

    def start(data: torch.Tensor) -> None:
        arguments = [ctypes.c_void_p(data.data_ptr()), ctypes.c_longlong(size // 16), ctypes.c_void_p(out.data_ptr())]
        KernelLaunch(kernel, 264, 1024, 0, arguments).start(torch.cuda.current_stream().cuda_stream)

    return graph_seconds([lambda data=data: start(data) for data in copies])


def microseconds(measure: Callable[[], float]) -> float | str:
    try:
        return measure() * 1e6
    except Exception as error:  # a peer that is missing or fails is a line in the table
        return f"{type(error).__name__}: {error}"[:40]


def row_of(name: str, batch: int, measure: Callable[[int, int], float]) -> dict[str, Any]:
    times = {shape: microseconds(lambda size=size: measure(*size)) for shape, size in {**LAYER, **SMALL}.items()}
    layer = [times[shape] for shape in LAYER]
    total = sum(layer) if all(isinstance(time, float) for time in layer) else ""
    return {"kernel": name, "batch": batch, **times, "layer": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", action="append", help="only these")
    parser.add_argument("--name", default="gemv", help="of the result")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    console, rows = Console(width=150), []
    first_use = {f"seconds to compile {spec}": compile_seconds(spec, device) for spec in options.spec or SPECS}
    for batch in BATCHES:
        rows += [row_of(name, batch, partial(peer, batch=batch)) for name, peer in PEERS.items()]
        for spec in options.spec or SPECS:
            rows.append(row_of(spec, batch, lambda m, k, s=spec, n=batch: launch_seconds([(s, m, k)], n, device)))
            console.print(rows[-1])
    for bits in (2, 3, 3.25, 4):
        rows.append(row_of(f"read {bits} bits", 1, lambda m, k, bits=bits: read_only(int(m * k * bits / 8))))
    save(options.name, rows, {})
    segments = {
        "q/k/v at tcq2-3.25": [("tcq2-3.25", m, 4096) for m in (4096, 1024, 1024)],
        "q/k/v at tcq2-3.5": [("tcq2-3.5", m, 4096) for m in (4096, 1024, 1024)],
        "q/k/v at tcq2-3, -3.125, -3.25": [
            *(("tcq2-3", 4096, 4096), ("tcq2-3.125", 1024, 4096), ("tcq2-3.25", 1024, 4096))
        ],
        "q/k/v at tcq2-3, -3.25, -3.5": [("tcq2-3", 4096, 4096), ("tcq2-3.25", 1024, 4096), ("tcq2-3.5", 1024, 4096)],
    }
    facts: dict[str, Any] = first_use
    facts |= {name: launch_seconds(parts, 1, device) * 1e6 for name, parts in segments.items()}
    facts |= {f"rotation of {n} x {k}": rotation_seconds(k, n, device) * 1e6 for k in (4096, 14336) for n in BATCHES}
    facts |= {f"tcq2-3.25 4096x4096, rotation included, batch {n}": crossover(n, device) for n in CROSSOVER}
    for blocks in ROTATION_BLOCKS:
        facts |= {f"4096x14336, rotation in {blocks} blocks, batch {n}": in_blocks(blocks, n, device) for n in BATCHES}
    console.print(facts)
    save(options.name, rows, facts)
    for batch in BATCHES:  # last, for they tune themselves: minutes, in which a session may end
        rows += [row_of(name, batch, partial(peer, batch=batch)) for name, peer in SLOW_PEERS.items()]
        save(options.name, rows, facts)


def compile_seconds(spec: str, device: torch.device) -> float:
    """Of the product of one token, compiled into empty caches: ours and NVRTC's."""
    decoder, limits = decoder_spec(spec), device_limits(0)
    assert decoder is not None
    source, macros = source_for([decoder]), tuple(sorted(kernel_macros(limits, 1).items()))
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    with tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, {CACHE: empty, "CUDA_CACHE_PATH": empty}):
        start = time.perf_counter()
        compile_cubin.__wrapped__(source, arch, macros)
        return time.perf_counter() - start


def in_blocks(blocks: int, batch: int, device: torch.device) -> float:
    """Microseconds of a product with its rotation, whose tokens are cut into so many blocks."""
    with patch.multiple(rotate, FEW_BLOCKS=blocks, BLOCKS_OF_A_FEW_TOKENS=blocks):
        return launch_seconds([("tcq2-3.25", 4096, 14336)], batch, device, with_rotation=True) * 1e6


def crossover(batch: int, device: torch.device) -> dict[str, float]:
    """Microseconds of both ways to multiply many tokens, and of cuBLAS without decoding."""
    times = {"cuBLAS fp16": cublas(4096, 4096, batch) * 1e6}
    for way, most_fused in (("fused", batch), ("decoded, then cuBLAS", 0)):
        with patch.object(product, "most_fused_tokens", return_value=most_fused):
            times[way] = launch_seconds([("tcq2-3.25", 4096, 4096)], batch, device, with_rotation=True) * 1e6
    return times


def save(name: str, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    for row in rows:
        base = next(other for other in rows if other["kernel"] == "cuBLAS fp16" and other["batch"] == row["batch"])
        row["over cuBLAS"] = base["layer"] / row["layer"] if row["layer"] else ""
    report(name, torch.cuda.get_device_name(), rows, unit="microseconds", **facts)


if __name__ == "__main__":
    main()
