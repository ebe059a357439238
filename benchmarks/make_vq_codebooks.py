"""Makes src/qpalette/codes/vq_codebooks.safetensors: k-means of N(0, I), and prints each codebook's distortion.

    python benchmarks/make_vq_codebooks.py [--device cuda]

The file is frozen: a stored model depends on it. This command is here to say where it came from.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from safetensors.torch import save_file

from qpalette.codes.vq import LEAST_INDEX_BITS, MOST_INDEX_BITS

ROUNDS, PAIRS_PER_POINT = 200, 2000


def nearest(pairs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cdist(part, points).argmin(1) for part in pairs.split(1 << 16)])


def k_means(bits: int, device: str) -> torch.Tensor:
    """Start at points of the asymptotically right density (the source's square root), so that no cluster starves."""
    count = 1 << bits
    generator = torch.Generator(device).manual_seed(bits)
    i = torch.arange(count, device=device) + 0.5
    radius, angle = (-4 * torch.log1p(-i / count)).sqrt(), 2 * torch.pi * i * (5**0.5 - 1) / 2
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    for _ in range(ROUNDS):
        pairs = torch.randn(min(count * PAIRS_PER_POINT, 1 << 23), 2, device=device, generator=generator)
        index = nearest(pairs, points)
        total = torch.zeros_like(points).index_add_(0, index, pairs)
        hits = torch.bincount(index, minlength=count)[:, None]
        points = torch.where(hits > 0, total / hits.clamp(min=1), points)
    return points


def main(device: str = "cpu", out: Path = Path("src/qpalette/codes/vq_codebooks.safetensors")) -> None:
    codebooks = {}
    for bits in range(LEAST_INDEX_BITS, MOST_INDEX_BITS + 1):
        points = k_means(bits, device).half()
        test = torch.randn(1 << 24, 2, device=device, generator=torch.Generator(device).manual_seed(1000))
        error = (test - points.float()[nearest(test, points.float())]).double().square().mean()
        codebooks[str(bits)] = points.cpu().contiguous()
        print(f"    {bits}: {float(error):.6f},  # gap {float(error) * 2.0**bits:.4f}", flush=True)
    save_file(codebooks, out)


if __name__ == "__main__":
    typer.run(main)
