"""Encoder speed on a CUDA device: data-free, calibrated (LDLQ), and the arithmetic floor of the search.

python benchmarks/cuda_encode_speed.py

The floor counts what a multiprocessor can issue per clock, two passes over 2^L states a step. One evaluation takes 2
instructions of the integer pipe (tag the winner, minimum; 64 lanes) beside 3 (one weight per step) or 6 (two) of the
float pipe (128 lanes); the slower pipe is the floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import typer
from report import report

from qpalette.calibration.feedback import encode_with_feedback, factorize
from qpalette.codes import parse_spec
from qpalette.codes.trellis import Trellis
from qpalette.runtime import select

SHAPES = ((4096, 4096), (14336, 4096))


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def floor(quantizer: Trellis, device: torch.device) -> float:
    """Weights per second, if one pipe never waited."""
    properties = torch.cuda.get_device_properties(device)
    per_evaluation = max(2 / 64, (3 if quantizer.values_per_step == 1 else 6) / 128)
    per_weight = 2 * 2**quantizer.memory / quantizer.values_per_step * per_evaluation
    return properties.multi_processor_count * properties.clock_rate * 1e3 / per_weight


SPECS = ("tcq-3.25", "tcq2-3.25", "tcq-2", "tcq2-2")


def main(repeats: int = 3) -> None:
    device = torch.device("cuda")
    rows = []
    for name in SPECS:
        quantizer, backend = parse_spec(name), select("encode", name, device)
        assert isinstance(quantizer, Trellis)
        for m, k in SHAPES:
            tiles = torch.randn(m * k // 256, 256, device=device)
            backend.encode(name, tiles)  # few tiles would be searched by another kernel, and this one compiled below
            best = m * k / min(seconds(lambda b=backend, n=name, t=tiles: b.encode(n, t)) for _ in range(repeats))
            row = {
                "spec": name,
                "shape": f"{m} x {k}",
                "weights/s": best,
                "of the floor": best / floor(quantizer, device),
            }
            rows.append({**row, "LDLQ / data-free": ""})
    for name in SPECS[:2]:
        backend = select("encode", name, device)
        m, k = 4096, 14336
        source = torch.randn(m, k, device=device)
        x = torch.randn(2 * k, k, device=device) * torch.rand(k, device=device)
        hessian = x.T @ x
        tiles = torch.randn(m * k // 256, 256, device=device)
        plain = seconds(lambda b=backend, n=name, t=tiles: b.encode(n, t))
        feedback = factorize(hessian)
        torch.cuda.synchronize()
        taken = seconds(
            lambda b=backend, n=name, s=source, f=feedback: encode_with_feedback(
                s[None], f.upper[None], lambda t: b.encode(n, t), lambda c: b.decode(n, c)
            )
        )
        factor_seconds = seconds(lambda h=hessian: factorize(h))
        rows.append(
            {
                "spec": name,
                "shape": f"{m} x {k}, LDLQ",
                "weights/s": m * k / (taken + factor_seconds),
                "of the floor": "",
                "LDLQ / data-free": plain / (taken + factor_seconds),
            }
        )
    report("cuda_encode_speed", torch.cuda.get_device_name(device), rows)


if __name__ == "__main__":
    typer.run(main)
