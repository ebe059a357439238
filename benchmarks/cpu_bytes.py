"""Products in bytes beside those in float32, on the processor, in one run: speed, and what the rounding costs.

    python benchmarks/cpu_bytes.py [--spec tcq-3 ...] [--threads 1 --threads 2] [--batch 8 ...] [--name cpu_bytes]
    python benchmarks/cpu_bytes.py --part input [--spec nuq-4 ...] [--threads 1] [--name cpu_input]
    python benchmarks/cpu_bytes.py --model MODEL --artifact OUT [--artifact OUT ...] --text FILE

Activations are float32. Times are of prepared products, rotation and Python included; both kinds take turns, and the
least of each counts. `--part input` tells the rotation and rounding of the input from the rest: what a product of no
rows would take, on the line through the times of two heights. KL is to the original in float32, on the same tokens.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import processor, report

from qpalette.codes import parse_spec
from qpalette.core.environment import CPU_BYTES
from qpalette.evaluate import evaluate_models, load_model, token_windows
from qpalette.rotate import pack_signs, random_signs, rotation_for
from qpalette.runtime import PackedLinear, Product, backends

CPU = backends()["cpu"]
SPECS = ["tcq-4", "tcq-3", "tcq-2", "nuq-4", "nuq-3", "vq-4", "vq-3"]
SHAPES = [(576, 576), (1536, 576), (2048, 8192), (8192, 2048)]
BATCHES = [1, 8, 512]
KINDS = {"float32": "0", "bytes": "1"}
TURNS = 30
HEIGHTS = 64, 576
INPUTS = [(576, "full"), (1536, "full"), (3072, "full"), (4096, "full"), (576, "block")]


class Part(StrEnum):
    products = "products"
    input = "input"


def random_product(spec: str, rows: int, columns: int, rotation: str = "full") -> Product:
    shape = (-(-rows // 16), -(-columns // 16), parse_spec(spec).words_per_tile)
    packed = PackedLinear(
        codes=CPU.to_layout(torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32), spec),
        scales=torch.ones(rows).half().view(torch.int16),
        diagonal=pack_signs(random_signs(columns, 0, spec)),
        spec=spec,
        rotation=rotation_for(columns, rotation).name,
        out_features=rows,
        in_features=columns,
        layout=CPU.layout,
    )
    return CPU.product([packed])


def seconds(product: Product, x: torch.Tensor, kind: str) -> float:
    os.environ[CPU_BYTES] = KINDS[kind]
    start = time.perf_counter()
    product(x)
    return time.perf_counter() - start


def timed(spec: str, rows: int, columns: int, batch: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    product, x = random_product(spec, rows, columns), torch.randn(batch, columns)
    best = dict.fromkeys(KINDS, float("inf"))
    for _ in range(TURNS):
        best = {kind: min(best[kind], seconds(product, x, kind)) for kind in KINDS}
    facts = {"spec": spec, "shape": f"{rows}x{columns}", "batch": batch, "threads": threads}
    speeds = {f"{kind} Gw/s": rows * columns / least / 1e9 for kind, least in best.items()}
    return facts | speeds | {"ratio": best["float32"] / best["bytes"]}


def input_parts(spec: str, columns: int, rotation: str, batch: int, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    products, x = [random_product(spec, rows, columns, rotation) for rows in HEIGHTS], torch.randn(batch, columns)
    best = dict.fromkeys(HEIGHTS, float("inf"))
    for _ in range(TURNS):
        for rows, product in zip(HEIGHTS, products, strict=True):
            best[rows] = min(best[rows], seconds(product, x.to(dtype), "bytes"))
    low, high = HEIGHTS
    of_a_row = (best[high] - best[low]) / (high - low)
    facts = {"spec": spec, "columns": columns, "rotation": rotation, "batch": batch, "threads": threads}
    return facts | {
        "type": str(dtype).removeprefix("torch."),
        "input ns an element": (best[low] - low * of_a_row) / (batch * columns) * 1e9,
        **{f"{rows} rows, GMAC/s": rows * columns * batch / least / 1e9 for rows, least in best.items()},
        "without the input, GMAC/s": columns * batch / of_a_row / 1e9,
    }


def losses(model: str, artifacts: list[Path], text: Path, windows: int, length: int) -> list[dict[str, Any]]:
    original, tokenizer = load_model(model)
    chosen, rows = token_windows(text, tokenizer, length, windows), []
    for artifact in artifacts:
        packed, kl = load_model(artifact)[0], {}
        for kind, value in KINDS.items():
            os.environ[CPU_BYTES] = value
            kl[kind] = evaluate_models(packed, original, chosen).kl
        rows.append({"artifact": artifact.name, **{f"KL {kind}": value for kind, value in kl.items()}})
        rows[-1]["ratio"] = kl["bytes"] / kl["float32"]
    return rows


def main(
    spec: Annotated[list[str] | None, typer.Option()] = None,
    threads: Annotated[list[int] | None, typer.Option()] = None,
    model: str | None = None,
    artifact: Annotated[list[Path] | None, typer.Option()] = None,
    text: Path | None = None,
    windows: int = 4,
    length: int = 512,
    batch: Annotated[list[int] | None, typer.Option()] = None,
    part: Part = Part.products,
    name: Annotated[str | None, typer.Option(help="Of the file of results.")] = None,
) -> None:
    if part is Part.input:
        types = [torch.float32, torch.bfloat16, torch.float16]
        cases = [(*each, size, dtype) for each in INPUTS for size in batch or (8, 512) for dtype in types]
        rows = [input_parts(each, *case, n) for each in spec or ["nuq-4"] for case in cases for n in threads or [1]]
        report(name or "cpu_input", processor(), rows, turns=TURNS)
    elif model is None or text is None:
        cases = [(*shape, size, n) for shape in SHAPES for size in batch or BATCHES for n in threads or [1, 2]]
        rows = [timed(each, *case) for each in spec or SPECS for case in cases]
        report(name or "cpu_bytes", processor(), rows, turns=TURNS)
    else:
        rows = losses(model, artifact or [], text, windows, length)
        report(name or "cpu_bytes_kl", processor(), rows, text=text.name, windows=windows, length=length)


if __name__ == "__main__":
    typer.run(main)
