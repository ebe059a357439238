"""The tables of products of many tokens: prompts, batches, mixtures."""

from __future__ import annotations

from figure_cells import scaled
from figure_page import Cell, Result, Table, section

BENCH = "qpalette bench --spec tcq2-3.25 --device cuda"


@section(
    "Products of many tokens on a GPU",
    "tiles_h200",
    command="""python benchmarks/tiles.py --spec tcq2-3.25 --spec nuq-3 --tokens 32 --tokens 48 --tokens 64 \\
    --tokens 96 --tokens 128 --tokens 192 --tokens 256 --tokens 512 --name tiles_h200""",
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


def _by_batch(*results: Result) -> Table:
    """The original of a run first; a ratio is over it, at the same batch."""
    rows = []
    for result in results:
        speeds = sorted(result["speeds"], key=lambda row: row["bits_per_weight"] is not None)
        original = {row["batch"]: row["tokens_per_second"] for row in speeds if row["bits_per_weight"] is None}
        for row in speeds:
            ratio = row["tokens_per_second"] / original[row["batch"]]
            rows.append(row | {"over": "" if row["bits_per_weight"] is None else f"{ratio:.2f}"})
    return Table.of(
        rows,
        {
            "": "{model}, batch {batch}",
            "tokens/s": "{tokens_per_second:.1f}",
            "over the original": "{over}",
            "ms": scaled("decode_seconds", 1e3, 2),
            "weights, GB": scaled("weight_bytes", 1e-9, 1),
            "peak memory, GB": scaled("peak_bytes", 1e-9, 1),
        },
    )


@section(
    "A mixture of experts as a whole on a GPU",
    "bench_qwen3-30b-a3b_batch1_h200",
    "bench_qwen3-30b-a3b_batch8_h200",
    command=f"""{BENCH} --config qwen3-30b-a3b --dtype bfloat16 --runner compile-graph --attention grouped \\
    --context 1024 --batch 1 --prefills 0 --steps 32  # second: --batch 8""",
)
def mixture_model(*results: Result) -> Table:
    """Qwen3-30B-A3B's shapes, all 48 layers, random weights and so uniform routes, compiled and captured; two runs."""
    return _by_batch(*results)


@section(
    "Whole models by batch, compiled",
    "bench_compiled_llama-3.1-8b_few_h200",
    "bench_compiled_llama-3.1-8b_many_h200",
    "bench_compiled_qwen3-8b_h200",
    command=f"""{BENCH} --config llama-3.1-8b --head tcq2-3.25 --dtype float16 --runner compile-graph \\
    --attention grouped --context 1024 --batch 1 --batch 16 --prefills 0 --steps 32
    # second: --batch 32 --batch 64; third: --config qwen3-8b""",
    pending=True,
)
def compiled_batches(*results: Result) -> Table:
    """After 1024 tokens, steps compiled and captured, the same attention for all, head at 3.25 bits; random weights. A
    ratio is over float16 at the same batch; three runs."""
    return _by_batch(*results)


@section(
    "What a prompt's road costs",
    "eval_prefill_float_h200",
    "eval_prefill_int8_h200",
    command="qpalette eval OUT --reference MODEL --text TEST --windows 16 --prefill float --device cuda --json  # int8",
    pending=True,
)
def roads(*results: Result) -> Table:
    """SmolLM2-135M by the one command at 2.5 bits, every token read as one of a prompt of 2048."""
    return Table.of(results, {"road": "{prefill}", "KL": "{kl:.4f}", "standard error": "{kl_stderr:.4f}"})
