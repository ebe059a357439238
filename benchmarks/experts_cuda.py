"""A layer of experts on a GPU, beside torch's own in 16 bits and the time to read what is touched, in one run.

    python benchmarks/experts_cuda.py [--model qwen3-30b-a3b ...] [--spec tcq2-3.25] [--batch 1 ...] [--no-with-plain]

Shapes are those of public models' experts, weights are random, gates all silu. Routes are uniform, several of them in
turn, so that weights come from memory. Graph replay; microseconds. R: over reading; S: the best 16-bit time over ours.
`mixed` has rates of 2.5, 3.25 and 4 bits, expert by expert, in place of 3.25.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import typer
from gemv import read_only
from report import device_name, report
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qpalette.backends.cuda.decoder import decoder_spec
from qpalette.backends.cuda.timing import COLD_BYTES, graph_seconds
from qpalette.codes import parse_spec
from qpalette.core.records import tiles_of
from qpalette.rotate import rotation_for
from qpalette.runtime import Gate, PackedExperts, PackedLinear, PreparedExperts, backends


class Shape(NamedTuple):
    hidden: int
    inner: int
    experts: int
    ranks: int

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.inner


MODELS = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4),
    "glm-4.5-air": Shape(4096, 1408, 128, 8),
    "deepseek-v3": Shape(7168, 2048, 256, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
}
BATCHES = (1, 4, 8, 16, 32, 64, 256, 1024)
MIXED = ("tcq2-2.5", "tcq2-3.25", "tcq2-4")
MOST_ROUTES = 16
DEVICE = torch.device("cuda", 0)


def matrix(spec: str, rows: int, columns: int) -> PackedLinear:
    """Of random codes; all of so many columns share signs and rotation."""
    decoder = decoder_spec(spec)
    assert decoder is not None
    shape = (tiles_of(rows), -(-columns // 256), decoder.chunk_words)
    codes = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=DEVICE).to(torch.int32)
    scales = torch.full((rows,), 0.02, device=DEVICE).half().view(torch.int16)
    signs = torch.zeros(-(-columns // 8), dtype=torch.uint8, device=DEVICE)
    rotation = rotation_for(columns, "block" if columns == 2880 else "full").name
    return PackedLinear(codes, scales, signs, spec, rotation, rows, columns, backends()["cuda"].layout)


def packed_layer(shape: Shape, specs: Sequence[str]) -> PreparedExperts:
    """Experts take the specs in turn."""
    of_expert = [specs[index % len(specs)] for index in range(shape.experts)]
    first = [[matrix(spec, shape.inner, shape.hidden) for _ in range(2)] for spec in of_expert]
    last = [matrix(spec, shape.hidden, shape.inner) for spec in of_expert]
    return PreparedExperts(PackedExperts(first, last, Gate("silu")))


def plain_layer(shape: Shape) -> Qwen3MoeExperts:
    config: Any = Qwen3MoeConfig(num_experts=shape.experts, hidden_size=shape.hidden, moe_intermediate_size=shape.inner)
    with DEVICE:
        layer = Qwen3MoeExperts(config).to(torch.bfloat16)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter.data, std=0.02)
    return layer


def routes(shape: Shape, tokens: int) -> list[torch.Tensor]:
    """Uniform, enough of them that what they touch exceeds the cache."""
    touched = min(shape.experts, tokens * shape.ranks) * shape.weights * 3 / 8
    count = min(MOST_ROUTES, max(2, int(COLD_BYTES / touched) + 1))
    scores = torch.rand(count, tokens, shape.experts, device=DEVICE)
    return list(scores.topk(shape.ranks, dim=-1).indices)


def microseconds(
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any], shape: Shape, indices: Sequence[torch.Tensor]
) -> float:
    x = torch.randn(len(indices[0]), shape.hidden, dtype=torch.bfloat16, device=DEVICE)
    weights = torch.full_like(indices[0], 1 / shape.ranks, dtype=torch.bfloat16)
    return graph_seconds([partial(run, x, index, weights) for index in indices]) * 1e6


def rows_of(
    name: str, shape: Shape, spec: str, batches: Sequence[int], with_mixed: bool, with_plain: bool
) -> list[dict[str, Any]]:
    uniform = packed_layer(shape, [spec])
    mixed = packed_layer(shape, MIXED) if with_mixed else None
    plain = plain_layer(shape) if with_plain else None
    rows = []
    for tokens in batches:
        indices = routes(shape, tokens)
        touched = sum(int(index.unique().numel()) for index in indices) / len(indices)
        with torch.no_grad():
            ours = microseconds(uniform, shape, indices)
            theirs = {
                way: microseconds(partial(ALL_EXPERTS_FUNCTIONS[way], plain), shape, indices)
                for way in ("grouped_mm", "batched_mm")
                if plain is not None
                and (way == "grouped_mm" or tokens * shape.ranks * shape.weights < 1 << 33)  # it copies each slot's
            }
            other = None if mixed is None else microseconds(mixed, shape, indices)
        reading = read_only(int(touched * shape.weights * float(parse_spec(spec).rate) / 8)) * 1e6
        row = {"model": name, "tokens": tokens, "touched": round(touched, 1), "us": ours, "R": ours / reading}
        row |= {
            "S": min(theirs.values()) / ours if theirs else None,
            "read us": reading,
            "mixed": None if other is None else other / ours,
        }
        rows.append(row | {f"{way} us": theirs.get(way) for way in ("grouped_mm", "batched_mm")})
        print(rows[-1], flush=True)
    return rows


def main(
    model: Annotated[list[str] | None, typer.Option()] = None,
    spec: str = "tcq2-3.25",
    batch: Annotated[list[int] | None, typer.Option()] = None,
    with_mixed: bool = True,
    with_plain: bool = True,
) -> None:
    rows: list[dict[str, Any]] = []
    for name in model or MODELS:
        rows += rows_of(name, MODELS[name], spec, batch or BATCHES, with_mixed, with_plain)
        torch.cuda.empty_cache()
        device = device_name("cuda")
        short = next(word for word in device.lower().split() if any(map(str.isdigit, word)))  # h100
        report(f"experts_{spec}_{short}", device, rows, spec=spec, mixed=list(MIXED))


if __name__ == "__main__":
    typer.run(main)
