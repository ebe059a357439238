"""The tables of what runs on a processor beside llama.cpp."""

from __future__ import annotations

from figure_cells import kl_of
from figure_page import Cell, Result, Table, section

AVX2_PEERS = "python benchmarks/cpu_peers.py --llama DIR --processor-time --rounds 1 --steps 16"
SPEEDS: dict[str, Cell] = {
    "decoding": "{decode tokens/s:.1f}",
    "over Q4_0": "{over Q4_0:.2f}",
    "prompt": "{prefill tokens/s:.1f}",
    "prompt over Q4_0": "{prefill over Q4_0:.2f}",
}


@section("CPU without AVX-512, beside llama.cpp", "cpu_peers_avx2", command=AVX2_PEERS)
def cpu_avx2(result: Result) -> Table:
    """A random model of half a billion weights, tokens per second of one thread's processor time, on an EPYC with AVX2
    that other work shared; one round."""
    return Table.of(result["rows"], {"weights": "{weights}", **SPEEDS})


@section(
    "CPU with AVX-512, beside llama.cpp",
    "cpu_peers_avx512",
    command="python benchmarks/cpu_peers.py --llama DIR --name cpu_peers_avx512",
    pending=True,
)
def cpu_avx512(result: Result) -> Table:
    """A random model of half a billion weights on two cores of an EPYC with AVX-512 (Zen 4, whose units are 256 bits
    wide), tokens per second, medians of five rounds in which all take turns."""
    return Table.of(result["rows"], {"weights": "{weights}", **SPEEDS})


@section(
    "CPU with AVX-512 in units of 512 bits, beside llama.cpp",
    "cpu_peers_zen5",
    command="python benchmarks/cpu_peers.py --llama DIR --name cpu_peers_zen5",
)
def cpu_zen5(result: Result) -> Table:
    """The same on two cores of an EPYC whose units are as wide as its registers (Zen 5). Ours keep their head in
    float32, llama.cpp's have theirs in 8 bits."""
    return Table.of(result["rows"], {"weights": "{weights}", **SPEEDS})


@section(
    "SmolLM2 with AVX-512, beside llama.cpp",
    "cpu_peers_smollm2_avx512",
    command="""python benchmarks/cpu_peers.py --llama DIR --model MODEL --text TEST --spec tcq-4 --spec nuq-4 \\
    --also embed_tokens --peer Q4_0 --peer Q2_K --peer Q3_K_M --peer Q4_K_M --artifact 3 --artifact 4 \\
    --name cpu_peers_smollm2_avx512
    # 3: qpalette quantize MODEL 3 --bits 3 --tokens 6144 --steps 16 --effort fast
    # 4: qpalette quantize MODEL 4 --bits 4 --device cuda --target cpu""",
)
def cpu_smollm2_avx512(result: Result) -> Table:
    """SmolLM2-135M-Instruct there: bits of the whole file over the weights, KL to the same original. tcq-4 and nuq-4
    are one code for all, rounded without calibration. 3 and 4 are bits that the one command was asked for: 3 on the two
    cores, in six minutes, with little text and nothing above 4 bits, 4 on a GPU for a processor, where a third of the
    weights has more than 4 bits, and is multiplied in float32.
    Rows of 576 numbers are no multiple of 256: llama.cpp replaces most of its K types."""
    facts: dict[str, Cell] = {"bits": "{bits:.2f}", "KL": kl_of("KL")}
    return Table.of(result["rows"], {"weights": "{weights}", **facts, **SPEEDS})


@section(
    "A model of rows of 512 with AVX-512, beside llama.cpp",
    "cpu_peers_dense_avx512",
    command="""python benchmarks/mixture.py --dense --width 512 --train TRAIN --steps 600 --device cuda --work DIR
    python benchmarks/cpu_peers.py --llama DIR --model DIR/model --text TEST --spec tcq-4 --spec nuq-4 \\
    --also embed_tokens --peer Q4_0 --peer Q2_K --peer Q3_K_M --peer Q4_K_M --name cpu_peers_dense_avx512""",
)
def cpu_dense_avx512(result: Result) -> Table:
    """The same of a Qwen2 of 27 million weights, trained on the first megabyte of WikiText-2: its rows are multiples of
    256, so that llama.cpp's K types are what they are called."""
    facts: dict[str, Cell] = {"bits": "{bits:.2f}", "KL": kl_of("KL")}
    return Table.of(result["rows"], {"weights": "{weights}", **facts, **SPEEDS})


@section(
    "A step of several sequences with AVX-512",
    "cpu_batch_avx512",
    command="""python benchmarks/cpu_step.py nuq-4 tcq-4 --dtype bfloat16 --batch 1 --batch 8 --rounds 40 \\
    --name cpu_batch_avx512""",
    pending=True,
)
def cpu_batch_avx512(result: Result) -> Table:
    """Milliseconds of processor time on one thread, of SmolLM2-135M in one code for all, embeddings, too: the step, and
    its longest kernels one by one. Other work ran beside."""
    rows = [row for row in result["rows"] if row["what"].startswith(("whole", "product", "step attention"))]
    return Table.of(rows, {"": "{model}, {what}", "batch 1": "{batch 1:.2f}", "batch 8": "{batch 8:.2f}"})
