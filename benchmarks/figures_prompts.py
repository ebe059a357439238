"""The tables of products of many tokens: prompts, batches, mixtures."""

from __future__ import annotations

from figure_cells import scaled
from figure_page import Cell, Result, Row, Table, section

BENCH = "qpalette bench --spec tcq2-3.25 --device cuda"


@section(
    "Products of many tokens on a GPU",
    "tiles_h200",
    command="""python benchmarks/tiles.py --spec tcq2-3.25 --spec nuq-3 --tokens 32 --tokens 64 --tokens 128 \\
    --name tiles_h200""",
    pending=True,
)
def many_tokens(result: Result) -> Table:
    """Microseconds on an H200, rotation counted, weights out of the cache, beside cuBLAS in float16; in brackets over
    it. Four warps multiply together (wgmma) from 33 tokens on."""
    codes = [key.removesuffix(" / cuBLAS") for key in result["rows"][0] if key.endswith(" / cuBLAS")]

    def cell(code: str) -> Cell:
        return lambda row: f"{row[code]:.1f} ({row[f'{code} / cuBLAS']:.2f})"

    times: dict[str, Cell] = {"cuBLAS": "{cuBLAS fp16:.1f}", **{code: cell(code) for code in codes}}
    return Table.of(result["rows"], {"matrices, tokens": "{shape}, {tokens}", **times})


@section(
    "The first token of a prompt on a GPU",
    "first_token_h200",
    command="python benchmarks/prefill.py --name first_token_h200",
    pending=True,
)
def prompts(result: Result) -> Table:
    """Milliseconds until the first token of a prompt, random weights, models taking turns; packed matrices multiply
    prompts by 16-bit floats or, with `--prefill int8`, as int8. Kernels alone are the GPU's busy time."""
    names = {"eager": "eager", "captured": "captured", "busy": "kernels alone"}
    times = {title: f"{{{task} ms:.1f}}" for task, title in names.items()}
    ratios = {f"{title} over float16": f"{{{task} ratio:.2f}}" for task, title in names.items()}
    return Table.of(result["rows"], {"": "{model}, {tokens} tokens, {weights}", **times, **ratios})


def _by_batch(result: Result) -> Table:
    return Table.of(
        result["speeds"],
        {
            "": "{model}, batch {batch}",
            "tokens/s": "{tokens_per_second:.1f}",
            "over the original": _ratio,
            "ms": scaled("decode_seconds", 1e3, 2),
            "weights, GB": scaled("weight_bytes", 1e-9, 1),
            "peak memory, GB": scaled("peak_bytes", 1e-9, 1),
        },
    )


def _ratio(row: Row) -> str:
    return "" if row["ratio"] is None else f"{row['ratio']:.2f}"


@section(
    "Whole models by batch",
    "bench_batches_llama-3.1-8b_h200",
    command=f"""{BENCH} --config llama-3.1-8b --head tcq2-3.25 --dtype float16 --runner graph \\
    --attention grouped --context 1024 --batch 1 --batch 16 --batch 32 --batch 64 --prefills 0 --steps 32""",
    pending=True,
)
def batches(result: Result) -> Table:
    """After 1024 tokens, steps captured, the same attention for all, head at 3.25 bits; random weights. A ratio is over
    float16 at the same batch."""
    return _by_batch(result)


@section(
    "A mixture of experts as a whole on a GPU",
    "bench_qwen3-30b-a3b_h200",
    command=f"""{BENCH} --config qwen3-30b-a3b --layers 24 --dtype bfloat16 --runner compile-graph --context 1024 \\
    --batch 1 --batch 8 --prefills 1 --steps 32 --alone""",
    pending=True,
)
def mixture_model(result: Result) -> Table:
    """Qwen3-30B-A3B's shapes, 24 of its 48 layers, random weights and so uniform routes, compiled and captured."""
    return _by_batch(result)
