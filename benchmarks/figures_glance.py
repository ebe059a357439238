"""A line of some of the tables: what README.md shows first."""

from __future__ import annotations

from pathlib import Path

from figure_cells import DATA_FREE, GENERATE, PEERS, batches, gap, over_bound, size_and_kl
from figure_page import Result, Table, row_of, section

THEIRS = {  # file by name
    "llama.cpp Q2_K": "-Q2_K.gguf",
    "llama.cpp Q4_0": "-Q4_0.gguf",
    "llama.cpp Q4_K_M": "-Q4_K_M.gguf",
    "bitsandbytes nf4": "nf4",
}


@section(
    "At a glance",
    *("palette_h100", "palette_published", "plan_published_memory", "plan_model_h100", "two_sided"),
    *("compare_peers", "gemv", GENERATE, "decode_speed"),
    command="# of each line: see its section",
)
def glance(codes: Result, published: Result, plans: Result, free: Result, calibrated: Result, *others: Result) -> Table:
    """A line of some of the sections below."""
    compared, gemv, generate, decode = others
    theirs = row_of(published["rows"], family="tcq", bits=3.0)
    plan = row_of(plans["rows"], bits="3.25")
    one_code = row_of(free["rows"], budget="3.25", **DATA_FREE)
    planned = row_of(calibrated["rows"], choice="planned", **{"bits asked": "3.25"})
    original, packed = generate["speeds"]
    plain, ours = (
        row_of(decode["rows"], model=name) for name in ("original bfloat16", "tcq-4 bfloat16, as qpalette generate")
    )
    peers = "; ".join(f"{batches(gemv, kernel, 1, 8)} {name}" for kernel, name in PEERS.items())
    models = {Path(row["model"]).name.removeprefix("SmolLM2-135M-Instruct"): row for row in compared["models"]}
    files = "; ".join(f"{size_and_kl(models[file])} {name}" for name, file in THEIRS.items())
    lines = {
        "error of a code of 3 bits over Shannon's bound": (
            gap(codes, "tcq-3"),
            f"{over_bound(theirs)} Q-Palette, published",
        ),
        "Llama-3.1-8B planned at 3.25 bits, predicted loss over the bound": (
            f"{plan['ours']:.3f}",
            f"{plan['published palette']:.3f} with Q-Palette's codes",
        ),
        "SmolLM2-135M at 3.25 bits, KL from the original, nats per token": (
            f"{planned['KL']:.4f} planned, calibrated on both sides",
            f"{one_code['KL']:.3f} the best single code, data-free",
        ),
        "SmolLM2-135M in one command, megabytes and KL": (
            f"{size_and_kl(models['-3bit'])} at 3 bits, {size_and_kl(models['-4bit'])} at 4",
            f"{files} (llama.cpp's K types are larger ones for its narrow rows)",
        ),
        "linears of a Llama-3.1-8B layer on an H100, batch 1 / 8, microseconds": (
            f"{batches(gemv, 'tcq2-3.25', 1, 8)} at 3.25 bits",
            peers,
        ),
        "Llama-3.1-8B, `generate` on an H100, tokens per second": (
            f"{packed['tokens_per_second']:.1f} at 3.25 bits",
            f"{original['tokens_per_second']:.1f} float16",
        ),
        "SmolLM2-135M on two cores, tokens per second": (
            f"{ours['tokens/s']:.1f} at 4 bits",
            f"{plain['tokens/s']:.1f} bfloat16 in torch",
        ),
    }
    return Table(("measured", "qpalette", "beside it"), [(name, *line) for name, line in lines.items()])
