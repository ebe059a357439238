"""Cells of tables that several pages of figures share."""

from __future__ import annotations

from figure_page import Cell, Result, Row, row_of

GENERATE = "bench_generate_llama-3.1-8b_h100_2026-11-27"
DATA_FREE = {"plan": "uniform", "rounding": "data-free"}
PEERS = {
    "cuBLAS fp16": "cuBLAS, float16",
    "tinygemm int4 g128": "torch int4 (tinygemm), group 128",
    "gemlite int4 g64": "gemlite int4, group 64",
    "bitsandbytes nf4": "bitsandbytes nf4",
}


def kl_text(value: float | None) -> str:
    """Three digits; nothing of a model against itself."""
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def kl_of(key: str) -> Cell:
    return lambda row: kl_text(row[key])


def scaled(key: str, factor: float, digits: int = 0) -> Cell:
    return lambda row: f"{factor * row[key]:.{digits}f}"


def over_first(speed: Row, result: Result) -> float:
    """Tokens per second over those of the run's first model at the same batch size."""
    first = row_of(result["speeds"], model=result["speeds"][0]["model"], batch=speed["batch"])
    return speed["tokens_per_second"] / first["tokens_per_second"]


def gap(measured: Result, spec: str) -> str:
    return f"{row_of(measured['rows'], spec=spec)['gap']:.3f}"


def over_bound(point: Row) -> str:
    return f"{point['distortion'] * 4 ** point['bits']:.3f}"


def layer_microseconds(gemv: Result, kernel: str, batch: int) -> float:
    return row_of(gemv["rows"], kernel=kernel, batch=batch)["layer"]


def batches(gemv: Result, kernel: str, *batches: int) -> str:
    return " / ".join(f"{layer_microseconds(gemv, kernel, batch):.1f}" for batch in batches)


def size_and_kl(model: Row) -> str:
    """Of a row of `qpalette compare`."""
    return f"{model['file_bytes'] / 1e6:.1f} and {kl_text(model['kl'])}"
