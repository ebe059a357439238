"""Makes src/qpalette/kvcache/vq4_codebooks.safetensors: k-means of N(0, I) in four dimensions, and prints distortions.

    python benchmarks/make_vq4_codebooks.py [--device cuda]

The file is frozen: what a cache loses is planned by it. This command is here to say where it came from.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from safetensors.torch import save_file

from qpalette.kvcache.codes import VQ4_CODEBOOKS, VQ4_INDEX_BITS

ROUNDS, VECTORS_PER_POINT, WIDTH = 200, 2000, 4


def nearest(vectors: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cdist(part, points).argmin(1) for part in vectors.split(1 << 16)])


def k_means(bits: int, device: str) -> torch.Tensor:
    """Start at points of the asymptotically right density, the source's to the power 4 / 6 (Panter and Dite)."""
    count = 1 << bits
    generator = torch.Generator(device).manual_seed(bits)
    points = torch.randn(count, WIDTH, device=device, generator=generator) * 1.5**0.5
    for _ in range(ROUNDS):
        vectors = torch.randn(count * VECTORS_PER_POINT, WIDTH, device=device, generator=generator)
        index = nearest(vectors, points)
        total = torch.zeros_like(points).index_add_(0, index, vectors)
        hits = torch.bincount(index, minlength=count)[:, None]
        points = torch.where(hits > 0, total / hits.clamp(min=1), points)
    return points


def main(device: str = "cpu", out: Path = VQ4_CODEBOOKS) -> None:
    codebooks = {}
    for bits in VQ4_INDEX_BITS:
        points = k_means(bits, device).half()
        test = torch.randn(1 << 22, WIDTH, device=device, generator=torch.Generator(device).manual_seed(1000))
        error = (test - points.float()[nearest(test, points.float())]).double().square().mean()
        codebooks[str(bits)] = points.cpu().contiguous()
        print(f"    {bits}: {float(error):.6f},  # gap {float(error) * 2.0 ** (bits / 2):.4f}", flush=True)
    save_file(codebooks, out)


if __name__ == "__main__":
    typer.run(main)
