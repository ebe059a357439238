"""Products of 16 to 256 tokens on a GPU, rotation included, beside cuBLAS' float16: microseconds, and over cuBLAS.

    python benchmarks/tiles.py

Graph replay, weights out of the cache. Shapes are those of a Llama-3.1-8B layer; gate and up are two matrices in one
launch, and one for cuBLAS.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from report import report

from qpalette.backends.cuda.probe import launch_seconds, plain_seconds

SHAPES = {"4096x4096": (1, 4096, 4096), "2 x 14336x4096": (2, 14336, 4096), "4096x14336": (1, 4096, 14336)}
SPECS = ("tcq2-3.25", "tcq-3.25", "nuq-3")
TOKENS = (16, 17, 24, 32, 48, 64, 96, 128, 256)


def row_of(shape: str, tokens: int, specs: list[str], device: torch.device) -> dict[str, Any]:
    count, rows, columns = SHAPES[shape]
    library = plain_seconds(count * rows, columns, tokens, device) * 1e6
    row: dict[str, Any] = {"shape": shape, "tokens": tokens, "cuBLAS fp16": library}
    for spec in specs:
        row[spec] = launch_seconds([(spec, rows, columns)] * count, tokens, device, with_rotation=True) * 1e6
        row[f"{spec} / cuBLAS"] = row[spec] / library
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", action="append", help="only these")
    parser.add_argument("--tokens", type=int, action="append", help="only so many")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    specs, tokens = options.spec or list(SPECS), options.tokens or TOKENS
    rows = [row_of(shape, number, specs, device) for shape in SHAPES for number in tokens]
    report("tiles", torch.cuda.get_device_name(), rows, unit="microseconds, rotation included")


if __name__ == "__main__":
    main()
