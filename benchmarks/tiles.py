"""Products of 16 to 768 tokens on a GPU, rotation included, beside cuBLAS' float16: microseconds, and over cuBLAS.

    python benchmarks/tiles.py [--quick]

Graph replay, weights out of the cache. Shapes are those of a Llama-3.1-8B layer; gate and up are two matrices in one
launch, and one for cuBLAS. Rows are kept as they come.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from report import commit, keep, report

from qpalette.backends.cuda.probe import launch_seconds, plain_seconds

SHAPES = {"4096x4096": (1, 4096, 4096), "2x14336x4096": (2, 14336, 4096), "4096x14336": (1, 4096, 14336)}
SPECS = ("tcq2-3.25", "tcq-3.25", "nuq-3")
TOKENS = (16, 17, 24, 32, 48, 64, 96, 128, 192, 256, 512, 768)
QUICK_SPECS, QUICK_TOKENS = SPECS[:1], (32, 64, 128)


def row_of(shape: str, tokens: int, specs: Sequence[str], device: torch.device) -> dict[str, Any]:
    count, rows, columns = SHAPES[shape]
    library = plain_seconds(count * rows, columns, tokens, device) * 1e6
    row: dict[str, Any] = {"shape": shape, "tokens": tokens, "cuBLAS fp16": library}
    for spec in specs:
        row[spec] = launch_seconds([(spec, rows, columns)] * count, tokens, device, with_rotation=True) * 1e6
        row[f"{spec} / cuBLAS"] = row[spec] / library
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SPECS[0]} at 32, 64 and 128 tokens")
    parser.add_argument("--spec", action="append", help="only these")
    parser.add_argument("--tokens", type=int, action="append", help="only so many")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these")
    parser.add_argument("--name", default="tiles", help="of the file in benchmarks/results")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device, name = torch.device("cuda", 0), torch.cuda.get_device_name()
    specs = options.spec or (QUICK_SPECS if options.quick else SPECS)
    numbers = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    facts = {"unit": "microseconds, rotation included", "commit": commit()}
    rows = []
    for tokens in numbers:
        for shape in options.shape or SHAPES:
            rows.append(row_of(shape, tokens, specs, device))
            print(*(f"{key}: {value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()))
            keep(options.name, name, rows, **facts)
    report(options.name, name, rows, **facts)


if __name__ == "__main__":
    main()
