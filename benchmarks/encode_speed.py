"""Weights per second of the CPU encoder at each effort, beside the same search in plain torch, in one run.

python benchmarks/encode_speed.py [--spec tcq-2 --spec tcq-4 ...]
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from report import processor, report

from qpalette.codes import parse_spec
from qpalette.codes.trellis import EFFORT
from qpalette.runtime import backends

TORCH_TILES = 16  # the plain search is slow; its speed does not depend on the number of tiles beyond a few


def weights_per_second(backend: str, spec: str, tiles: torch.Tensor) -> float:
    backends()[backend].encode(spec, tiles[:16])  # compiles
    start = time.perf_counter()
    backends()[backend].encode(spec, tiles)
    return tiles.numel() / (time.perf_counter() - start)


def main(spec: Annotated[list[str] | None, typer.Option()] = None, seconds: float = 10) -> None:
    tiles = torch.randn(1 << 14, 256, generator=torch.Generator().manual_seed(0))
    rows = []
    for name in spec or ["tcq-2", "tcq-3.25", "tcq-4"]:
        for effort in EFFORT:
            quantizer = parse_spec(name).with_effort(effort)
            probe = weights_per_second("cpu", quantizer.name, tiles[:64])
            count = min(len(tiles), max(64, int(probe * seconds / 256) // 32 * 32))
            fast = weights_per_second("cpu", quantizer.name, tiles[:count])
            plain = weights_per_second("ref", quantizer.name, tiles[:TORCH_TILES])
            rows.append(
                {"spec": quantizer.name, "effort": effort, "cpu weights/s": fast, "torch": plain, "ratio": fast / plain}
            )
            report("encode_speed", processor(), rows)


if __name__ == "__main__":
    typer.run(main)
