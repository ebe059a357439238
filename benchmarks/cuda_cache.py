"""Attention of one new token over caches of codes on a GPU, beside a cache of 16 bits; and what writing a token costs.

    python benchmarks/cuda_cache.py [--context 2048 --context 32768] [--batch 1] [--code nuq-3 --code vq-2.5/vq-2]

Microseconds of one layer of Llama-3.1-8B (32 queries, 8 key heads, 128 numbers), in a CUDA graph over as many layers as
hold more than the second cache does, so that each is read from memory; the lower quartile of replays. "read" counts
stored bytes of keys and values once. Keys are coded as shaped ones are, four sinks are exact, a cache is as long as its
context. Beside it torch's attention over 16 bits, given whole groups as transformers does it, and `attend.cu`; each
with what writes a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import quantiles
from typing import Annotated, Any

import torch
import typer
from report import commit, device_name, report

from qpalette.backends.cuda.attend import attend, attends
from qpalette.backends.cuda.graphs import capture_graph
from qpalette.kvcache import Exact, Stream, Transform, VectorFormat, parse_code, white
from qpalette.runtime import select

HEADS, KEY_HEADS, DIM = 32, 8, 128
GROUP = HEADS // KEY_HEADS
RESIDENT = 200 << 20  # bytes that are read between two looks at the same layer
MOST_LAYERS = 160
DEVICE, TYPE = torch.device("cuda"), torch.bfloat16
CACHES = ["nuq-3", "nuq-4", "vq-2", "vq-2.5", "vq-3", "vq4-2"]


def main(
    context: Annotated[list[int] | None, typer.Option()] = None,
    batch: Annotated[list[int] | None, typer.Option()] = None,
    code: Annotated[list[str] | None, typer.Option()] = None,
    name: str = "cuda_cache",
) -> None:
    rows = []
    for sequences, tokens in itertools.product(batch or [1, 4], context or [2048, 8192, 32768]):
        base = dense_times(tokens, sequences)
        for spec in code or CACHES:
            rows.append(row_of(spec, tokens, sequences, base))
            print(rows[-1], flush=True)
    report(name, device_name("cuda"), rows, commit=commit())


def row_of(spec: str, tokens: int, batch: int, base: dict[str, float]) -> dict[str, Any]:
    keys, _, values = spec.partition("/")
    layers = coded_layers(keys, values or keys, tokens, batch)
    read = sum(stream.format.bits * DIM / 8 for stream in layers[0]) * KEY_HEADS * tokens * batch
    new = torch.randn(batch, KEY_HEADS, 1, DIM, device=DEVICE, dtype=TYPE)
    query = torch.randn(batch, KEY_HEADS, GROUP, DIM, device=DEVICE, dtype=TYPE)
    last = torch.tensor([tokens - 1], device=DEVICE)
    count, starts = last[0] + 1, torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=DEVICE)

    def write(pair: tuple[Stream, Stream]) -> None:
        pair[0].write_both(pair[1], new, new, last, starts)

    def read_codes(pair: tuple[Stream, Stream]) -> None:
        assert pair[0].attend(pair[1], query, mask, count, starts, DIM**-0.5) is not None

    def both(pair: tuple[Stream, Stream]) -> None:
        write(pair)
        read_codes(pair)

    written, attended, all_of_it = (microseconds(work, layers) for work in (write, read_codes, both))
    row = {"cache": spec, "context": tokens, "batch": batch, "write us": written, "attend us": attended}
    row |= {"both us": all_of_it, "read MB": float(read) / 1e6, "GB/s": float(read) / attended / 1e3}
    ratios = {f"{other} over it": time / all_of_it for other, time in base.items()}
    return row | {f"{other} us": time for other, time in base.items()} | ratios


def coded_layers(key_code: str, value_code: str, tokens: int, batch: int) -> list[tuple[Stream, Stream]]:
    """Of random codes, whose scales are about 1."""
    made = []
    for code, kind in ((parse_code(key_code), "keys"), (parse_code(value_code), "values")):
        format = VectorFormat(code, DIM, kind == "keys")
        transform = white(DIM) if kind == "values" else key_transform()
        own = select("cache", code.name, DEVICE).stream
        made.append((own, (format, transform, Exact(4, 0), (batch, KEY_HEADS, tokens), TYPE, DEVICE)))
    layers = []
    for _ in range(layers_for(sum(float(own[1][0].bits) for own in made) / 8 * DIM * KEY_HEADS * tokens * batch)):
        pair = tuple(own(*given) for own, given in made)
        for stream in pair:
            stream.codes.copy_(torch.randint(0, 256, stream.codes.shape, dtype=torch.uint8, device=DEVICE))
            stream.scales.copy_(torch.randint(150, 170, stream.scales.shape, dtype=torch.uint8, device=DEVICE))
        layers.append(pair)
    return layers


def key_transform() -> Transform:
    """With a matrix for each head and errors that are fed back, as `shaped` makes it; the numbers cost no time."""
    plain = white(DIM)
    parts = (plain.matrix, plain.inverse, plain.mean, torch.ones(1, DIM, DIM).tril(-8) / DIM, torch.ones(1))
    return Transform(*(part.repeat(KEY_HEADS, *[1] * (part.ndim - 1)) for part in parts))


def layers_for(size: float) -> int:
    return max(2, min(MOST_LAYERS, round(RESIDENT / size)))


def dense_times(tokens: int, batch: int) -> dict[str, float]:
    """Of torch's attention and of `attend.cu`, with what writes a token."""
    query = torch.randn(batch, HEADS, 1, DIM, device=DEVICE, dtype=TYPE)
    new, last = query[:, :KEY_HEADS].clone(), torch.tensor([tokens - 1], device=DEVICE)
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=DEVICE)
    shape = (batch, KEY_HEADS, tokens, DIM)
    count = layers_for(4.0 * KEY_HEADS * DIM * tokens * batch)
    layers = [tuple(torch.randn(shape, device=DEVICE, dtype=TYPE) for _ in range(2)) for _ in range(count)]
    grouped = query.reshape(batch, KEY_HEADS, GROUP, DIM)

    def write(layer: tuple[torch.Tensor, ...]) -> None:
        for each in layer:
            each.index_copy_(2, last, new)

    def by_torch(layer: tuple[torch.Tensor, ...]) -> None:
        write(layer)
        torch.nn.functional.scaled_dot_product_attention(grouped, *layer, attn_mask=mask)

    def by_ours(layer: tuple[torch.Tensor, ...]) -> None:
        write(layer)
        attend(query, *layer, mask, DIM**-0.5)

    times = {"sdpa": microseconds(by_torch, layers)}
    if attends(query, *layers[0], mask):
        times["attend.cu"] = microseconds(by_ours, layers)
    return times


def microseconds(work: Callable[[Any], None], layers: list[Any]) -> float:
    """Of one layer, in a graph of all."""

    def all_layers() -> None:
        for layer in layers:
            work(layer)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work(layers[0])
    torch.cuda.synchronize()
    graph = capture_graph(all_layers)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(layers))
    return quantiles(times, n=4)[0]


if __name__ == "__main__":
    typer.run(main)
