"""Every table of figures in docs/figures.md and README.md, from the files in benchmarks/results/; none is typed.

    python benchmarks/figures.py

writes docs/figures.md, and the tables that README.md names between markers. What the first column says may be typed;
all else comes from the files. `tests/unit/test_figures.py` makes all of it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from figure_page import Cell, Result, Row, Table, filled, page, row_of, section
from report import RESULTS

ROOT = Path(__file__).resolve().parent.parent
PAGE, README = ROOT / "docs" / "figures.md", ROOT / "README.md"
INTRODUCTION = """# Figures

Made by `python benchmarks/figures.py` from the files named under each table, which have the machine, the date and all
digits; the command above them is the one that measured them. What one page of `docs/` is about has its figures there.
"""
DATA_FREE, PLANNED = {"plan": "uniform", "rounding": "data-free"}, {"plan": "planned, fisher"}
BITS = ("1.5", "2", "2.5", "3", "3.25", "3.5", "4", "5", "6", "8")
OURS = ("tcq2-2", "tcq2-3", "tcq2-3.25", "tcq2-4", "tcq-3.25", "tcq-4", "vq-3", "vq-4", "nuq-3")
PEERS = {
    "cuBLAS fp16": "cuBLAS, float16",
    "tinygemm int4 g128": "torch int4 (tinygemm), group 128",
    "gemlite int4 g64": "gemlite int4, group 64",
    "bitsandbytes nf4": "bitsandbytes nf4",
}
GENERATE = "bench_generate_llama-3.1-8b_h100_2026-11-27"
STEP = "bench_llama-3.1-8b_h100_2026-11-25"
BENCH = "qpalette bench --config CONFIG --spec SPEC --head tcq2-3.25 --device cuda"
GRAPH = f"{BENCH} --runner compile-graph --attention grouped"


@section(
    "At a glance",
    *("palette_h100", "palette_published", "plan_published_memory", "plan_model_h100", "plan_model_ldlq_cpu"),
    *("gemv", GENERATE, "decode_speed"),
    command="# of each line: see its section",
)
def glance(codes: Result, published: Result, plans: Result, free: Result, calibrated: Result, *speeds: Result) -> Table:
    """A line of some of the sections below."""
    gemv, generate, decode = speeds
    theirs = row_of(published["rows"], family="tcq", bits=3.0)
    plan = row_of(plans["rows"], bits="3.25")
    one_code = row_of(free["rows"], budget="3.25", **DATA_FREE)
    planned = row_of(calibrated["rows"], budget="3.25")
    original, packed = generate["speeds"]
    plain, ours = (row_of(decode["rows"], model=f"{name} bfloat16") for name in ("original", "tcq-4"))
    peers = "; ".join(f"{_batches(gemv, kernel, 1, 8)} {name}" for kernel, name in PEERS.items())
    lines = {
        "error of a code of 3 bits over Shannon's bound": (
            _gap(codes, "tcq-3"),
            f"{_over_bound(theirs)} Q-Palette, published",
        ),
        "Llama-3.1-8B planned at 3.25 bits, predicted loss over the bound": (
            f"{plan['ours']:.3f}",
            f"{plan['published palette']:.3f} with Q-Palette's codes",
        ),
        "SmolLM2-135M at 3.25 bits, KL from the original, nats per token": (
            f"{planned['KL']:.4f} planned, calibrated",
            f"{one_code['KL']:.3f} the best single code, data-free",
        ),
        "linears of a Llama-3.1-8B layer on an H100, batch 1 / 8, microseconds": (
            f"{_batches(gemv, 'tcq2-3.25', 1, 8)} at 3.25 bits",
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


@section(
    "Planned against uniform",
    *("plan_model_2.5_h100", "plan_model_h100", "plan_model_4_uniform_cpu"),
    *("plan_model_2.5_cpu", "plan_model_3.25_cpu", "plan_model_4_cpu", "plan_model_ldlq_cpu"),
    command="""python benchmarks/plan_model.py MODEL --text FILE --calibration FILE
qpalette quantize MODEL OUT --spec tcq-3.875       # uniform at 4 bits; then qpalette eval""",
)
def planned(low: Result, three: Result, four: Result, *plans: Result) -> Table:
    """SmolLM2-135M-Instruct, KL in nats per token on the first 16 windows of the WikiText-2 test text. "Uniform" is the
    best single code within the budget, data-free; calibrated is rounding with feedback from the inputs, no tuning.
    Predictions are second-order: too low where the loss is large."""
    *white, calibrated = plans
    uniform = {
        "2.5": row_of(low["rows"], **DATA_FREE)["KL"],
        "3": row_of(three["rows"], budget="3", **DATA_FREE)["KL"],
        "3.25": row_of(three["rows"], budget="3.25", **DATA_FREE)["KL"],
        "4": four["kl"],
    }
    data_free = [row_of(three["rows"], budget="3", **PLANNED), *(row for result in white for row in result["rows"])]

    def pair(rows: Sequence[Row], bits: str) -> tuple[str, ...]:
        found = [(_kl(row["KL"]), _kl(row["predicted KL"])) for row in rows if row["budget"] == bits]
        return found[0] if found else ("", "")

    return Table(
        ("bits per weight, everything counted", "uniform", "planned", "predicted", "planned, calibrated", "predicted"),
        [(b, _kl(kl), *pair(data_free, b), *pair(calibrated["rows"], b)) for b, kl in uniform.items()],
    )


@section(
    "One code for all linears",
    *("rates_h100", "rates_cpu"),
    command="python benchmarks/rates.py MODEL --text FILE --hessians DIR --device cuda",
)
def rates(gpu: Result, cpu: Result) -> Table:
    """SmolLM2-135M-Instruct, the same text; calibrated on 131072 tokens of the training text."""
    rows = [*gpu["rows"], *cpu["rows"]]
    original = ("16 bits", "", "", f"{gpu['rows'][0]['16-bit perplexity']:.2f}", "", "")

    def line(free: Row) -> tuple[str, ...]:
        calibrated = [row for row in rows if row["spec"] == free["spec"] and row["rounding"] == "calibrated"]
        found = [text for row in calibrated for text in (_kl(row["KL"]), f"{row['perplexity']:.2f}")] or ["", ""]
        return (free["spec"], f"{free['bits']:.3f}", _kl(free["KL"]), f"{free['perplexity']:.2f}", *found)

    columns = ("code", "bits per weight, all counted", "KL, data-free", "perplexity", "KL, calibrated", "perplexity")
    return Table(columns, [*(line(row) for row in rows if row["rounding"] == "data-free"), original])


@section(
    "Tuning", "tuning_small_cpu", command="qpalette tune OUT --reference MODEL --text FILE --out TUNED  # and so on"
)
def tuning(result: Result) -> Table:
    """A few steps on one busy processor; measured on 4 windows of text that tuning never saw."""
    rows = [{"name": "tcq-3-L12", **result["before"]}, {"name": "tuned", **result["after"]}]
    bits, perplexity = "{bits_per_weight:.3f}", "{perplexity:.2f}"
    return Table.of(rows, {"": "{name}", "bits per weight": bits, "KL": _kl_of("kl"), "perplexity": perplexity})


@section("Plans on published sensitivities", "plan_published_memory", command="python benchmarks/plan_published.py")
def published_plans(result: Result) -> Table:
    """Llama-3.1-8B, predicted loss over the information-theoretic bound; codes alone counted, as in the publication."""
    palettes = {"this palette": "{ours:.3f}", "published palette, planned alike": "{published palette:.3f}"}
    return Table.of(result["rows"], {"average bits": "{bits}", **palettes})


@section(
    "The palette",
    *("palette_h100", "palette_published"),
    command="qpalette palette --measure tcq-3 --weights 2097152 --device cuda       # and so for each",
)
def palette(measured: Result, published: Result) -> Table:
    """Distortion over Shannon's bound on Gaussian weights. tcq has one weight per step of the trellis, tcq2 two."""
    specs = {row["spec"] for row in measured["rows"]}

    def ours(family: str) -> list[str]:
        return [_gap(measured, f"{family}-{bits}") if f"{family}-{bits}" in specs else "" for bits in BITS]

    known = {f"{row['bits']:g}": _over_bound(row) for row in published["rows"] if row["family"] == "tcq"}
    theirs = [known.get(bits, "") for bits in BITS]
    return Table(("bits", *BITS), [("tcq", *ours("tcq")), ("tcq2", *ours("tcq2")), ("published tcq", *theirs)])


@section(
    "The palette with a longer search",
    "palette_best_h100",
    command="qpalette palette --measure tcq-2-L20 --weights 2097152 --device cuda",
)
def palette_best(result: Result) -> Table:
    """Distortion over Shannon's bound; `--effort best` is L = 18."""
    return Table.of(result["rows"], {"code": "{spec}", "over Shannon's bound": "{gap:.3f}"})


@section(
    "Full or block-diagonal rotation",
    "rotations",
    command="python benchmarks/rates.py MODEL --text FILE --windows 4 --rotation full --rotation block",
)
def rotations(result: Result) -> Table:
    """Within one standard error of each other: no difference that this run can see. Full is the default."""
    figures = {"KL": _kl_of("KL"), "standard error": "{KL stderr:.4f}", "perplexity": "{perplexity:.2f}"}
    return Table.of(result["rows"], {"rotation": "{rotation}", "code": "{spec}", **figures})


@section("Encoding on two cores", "encode_speed", command="python benchmarks/encode_speed.py")
def encode_cpu(result: Result) -> Table:
    """Thousands of weights per second; torch is the same search in plain torch, in the same run."""
    speeds: dict[str, Cell] = {"weights/s": _scaled("cpu weights/s", 1e-3), "torch": _scaled("torch", 1e-3, 2)}
    return Table.of(result["rows"], {"code": "{spec}", "effort": "{effort}", **speeds, "ratio": "{ratio:.0f}"})


@section("Encoding on a GPU", "cuda_encode_speed_three_repeats", command="python benchmarks/cuda_encode_speed.py")
def encode_gpu(result: Result) -> Table:
    """Millions of weights per second, two passes at standard effort; LDLQ is rounding with feedback."""

    def share(row: Row) -> str:
        return f"{row['LDLQ / data-free']:.2f}" if row["LDLQ / data-free"] else ""

    million = _scaled("weights/s", 1e-6, 1)
    return Table.of(result["rows"], {"code, shape": "{spec}, {shape}", "weights/s": million, "over data-free": share})


@section("Memory while quantizing", "memory", command="python benchmarks/memory.py")
def memory(result: Result) -> Table:
    """Megabytes, hidden size 1024: the peak does not grow with the model."""
    model = {"layers": "{layers}", "model": "{model MB:.0f}", "largest tensor": "{largest tensor MB:.1f}"}
    return Table.of(result["rows"], {**model, "peak above the libraries": "{above libraries MB:.0f}"})


@section("Answers on two cores", "decode_speed", command="python benchmarks/decode_speed.py MODEL ARTIFACT")
def decode_cpu(result: Result) -> Table:
    """SmolLM2-135M, batch 1. Any other load on the two cores can halve it."""
    speed = {"tokens/s": "{tokens/s:.1f}", "over the faster original": "{ratio to the faster original:.2f}"}
    return Table.of(result["rows"], {"model": "{model}", **speed})


@section("The first token on two cores", "first_token_cpu", command="python benchmarks/first_token.py")
def first_token(result: Result) -> Table:
    """Seconds; a random model of 27 quantizers, without transformers. Kernels are compiled once and kept on disk."""
    parts = {"prompt": "{prompt:.1f}", "first token": "{first token:.2f}", "whole program": "{whole process:.1f}"}
    return Table.of(result["rows"], {"start": "{start}", **parts})


@section(
    "Answers on a GPU",
    *(GENERATE, "bench_generate_compiled_llama-3.1-8b_h100_2026-11-27", "bench_generate_qwen3-8b_h100_2026-11-27"),
    command=f"{BENCH} --runner generate --steps 512 --batch 1",
)
def generate_gpu(llama: Result, compiled: Result, qwen: Result) -> Table:
    """What `qpalette generate`, `chat` and `serve` give: 512 tokens after a prompt of 1024, by the times at which they
    reach the host. Weights are random: the speed does not depend on them. A ratio is over the float16 of its run."""
    rows = [
        {**speed, "note": note, "ratio": _over_first(speed, result)}
        for result, note in ((llama, ""), (compiled, ", `--compile`"), (qwen, ""))
        for speed in result["speeds"]
    ]
    return Table.of(
        rows,
        {
            "": "{model}{note}",
            "tokens/s": "{tokens_per_second:.1f}",
            "over float16": "{ratio:.2f}",
            "first token, ms": _scaled("prefill_seconds", 1e3),
            "until the step is captured or compiled, once, s": "{warm_seconds:.1f}",
        },
    )


@section("transformers' own generate, eager", "eager", command="python benchmarks/eager.py")
def eager(result: Result) -> Table:
    """On an H100, models taking turns, after 1024 tokens."""

    def eight(row: Row) -> str:
        return f"{row_of(result['rows'], model=row['model'], weights=row['weights'], batch=8)['eager tokens/s']:.0f}"

    return Table.of(
        [row for row in result["rows"] if row["batch"] == 1],
        {
            "": "{model} {weights}",
            "host, us a layer": "{host us/layer:.0f}",
            "of it, linears": "{linears us/layer:.0f}",
            "tokens/s": "{eager tokens/s:.1f}",
            "batch 8": eight,
            "prompt of 1024, ms": "{prompt eager ms:.1f}",
            "captured": "{prompt captured ms:.1f}",
            "kernels alone": "{prompt busy ms:.1f}",
        },
    )


@section("One step on a GPU", STEP, "bench_llama-3.1-8b_rates_h100_2026-11-25", command=GRAPH)
def step(*results: Result) -> Table:
    """Llama-3.1-8B after 1024 tokens, static cache, compiled and captured in one CUDA graph, the same harness and the
    same attention for all, head at 3.25 bits. Two runs; a ratio is over the float16 of its run."""
    rows = [{**speed, "ratio": _over_first(speed, result)} for result in results for speed in result["speeds"]]
    return Table.of(
        rows,
        {
            "": "{model}, batch {batch}",
            "bits per weight": lambda row: f"{row['bits_per_weight']:.3f}" if row["bits_per_weight"] else "",
            "tokens/s": "{tokens_per_second:.1f}",
            "over float16": "{ratio:.2f}",
            "ms": _scaled("decode_seconds", 1e3, 2),
            "peak memory, GB": _scaled("peak_bytes", 1e-9, 1),
        },
    )


@section("Where a step's time goes", STEP, command=f"{GRAPH} --breakdown")
def step_shares(result: Result) -> Table:
    """Microseconds of the step above, batch 1; "other" is the rotary embedding, the cache and the activation.

    ![Tokens per second, and where a step's time goes](speed.png)"""
    models: Mapping[str, Sequence[Row]] = result["breakdown"]
    parts = [share["part"] for share in next(iter(models.values()))]
    rows = [[model, *(f"{1e6 * share['seconds']:.0f}" for share in shares)] for model, shares in models.items()]
    return Table(("", *parts), rows)


@section("Plans for a speed", "plan_latency", command="python benchmarks/plan_latency.py SENSITIVITIES")
def plans_for_a_speed(result: Result) -> Table:
    """Llama-3.1-8B on an H100, made from the launches that come with qpalette, with a margin of 3 percent, then timed.
    The plan of batch 8 misses its speed; the profile has since declared 7 percent there."""
    return Table.of(
        result["rows"],
        {
            "asked for": "{budget}, batch {batch}",
            "bits per weight": "{bits:.3f}",
            "predicted, ms": "{predicted ms:.3f}",
            "measured, ms": "{measured ms:.3f}",
            "tokens/s": "{measured tokens/s:.0f}",
            "time over the prediction": "{measured over predicted:.3f}",
        },
    )


@section("Products on a GPU, beside others", "gemv", command="python benchmarks/gemv.py")
def products(result: Result) -> Table:
    """The linears of one Llama-3.1-8B layer, microseconds, weights out of the cache, rotations apart."""
    plain = {batch: _layer(result, "cuBLAS fp16", batch) for batch in (1, 8, 16)}
    rows = []
    for kernel in (*OURS, *PEERS):
        times = {batch: _layer(result, kernel, batch) for batch in plain}
        faster = " / ".join(f"{plain[batch] / time:.2f}" for batch, time in times.items())
        rows.append((PEERS.get(kernel, kernel), *(f"{time:.1f}" for time in times.values()), faster))
    return Table(("", *(f"batch {batch}" for batch in plain), "faster than cuBLAS"), rows)


@section(
    "The same tokens everywhere",
    *("greedy_agreement", "greedy_agreement_cuda"),
    command="python benchmarks/greedy_agreement.py ARTIFACT --run cpu --run vllm --vllm-python .venv-vllm/bin/python",
)
def greedy(*results: Result) -> Table:
    """SmolLM2-135M at tcq-3.25-L12, 64 greedy tokens after each of 8 prompts: transformers on a processor and on an
    H100, vLLM on a processor; and whether each token is the most likely one to the reference decoder."""
    rows = [row for result in results for row in result["rows"] if row is not results[1]["rows"][0]]
    return Table.of(
        rows, {"run": "{run}", "as on the cpu": "{prompts equal to cpu's}", "as ref": "{prompts as ref would}"}
    )


@section("A conversation", "conversation", command="python benchmarks/conversation.py")
def conversation(result: Result) -> Table:
    """SmolLM2-135M on an H100: ten turns that keep their cache, all tokens those of eager greedy decoding."""
    speeds = {"tokens/s": "{tokens/s:.0f}", "eager": "{eager tokens/s:.1f}"}
    return Table.of(result["rows"], {"turn": "{turn}", **speeds, "first token, ms": _scaled("first token s", 1e3)})


@section("A long-running server", "serve_memory", command="python benchmarks/serve_memory.py")
def serve_memory(result: Result) -> Table:
    """MiB of an H100 in use while `qpalette serve` answers requests of random lengths."""
    first, last = "{MiB after 20:.0f}", "{MiB at the end:.0f}"
    return Table.of(result["rows"], {"requests": "{requests}", "after 20": first, "at the end": last})


def compared(result: Result) -> Table:
    """All bytes of the weight files over the weights of the original; KL in nats per token, its mean and its median."""
    return Table.of(
        result["models"],
        {
            "model": lambda row: Path(row["model"]).name,
            "MB": _scaled("file_bytes", 1e-6, 1),
            "bits per weight": "{bits_per_weight:.3f}",
            "KL": _kl_of("kl"),
            "median": _kl_of("kl_median"),
            "top-1, %": lambda row: f"{100 * row['top1']:.1f}" if row["top1"] is not None else "",
            "perplexity": "{perplexity:.2f}",
        },
    )


for _file in sorted(RESULTS.glob("compare_*.json")):
    section(f"{_file.stem}", _file.stem, command="qpalette compare MODEL ... --text FILE --json", name=_file.stem)(
        compared
    )


def _kl(value: float | None) -> str:
    """Three digits; nothing of a model against itself."""
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _kl_of(key: str) -> Cell:
    return lambda row: _kl(row[key])


def _scaled(key: str, factor: float, digits: int = 0) -> Cell:
    return lambda row: f"{factor * row[key]:.{digits}f}"


def _over_first(speed: Row, result: Result) -> float:
    """Tokens per second over those of the run's first model at the same batch size."""
    first = row_of(result["speeds"], model=result["speeds"][0]["model"], batch=speed["batch"])
    return speed["tokens_per_second"] / first["tokens_per_second"]


def _gap(measured: Result, spec: str) -> str:
    return f"{row_of(measured['rows'], spec=spec)['gap']:.3f}"


def _over_bound(point: Row) -> str:
    return f"{point['distortion'] * 4 ** point['bits']:.3f}"


def _layer(gemv: Result, kernel: str, batch: int) -> float:
    return row_of(gemv["rows"], kernel=kernel, batch=batch)["layer"]


def _batches(gemv: Result, kernel: str, *batches: int) -> str:
    return " / ".join(f"{_layer(gemv, kernel, batch):.1f}" for batch in batches)


if __name__ == "__main__":
    PAGE.write_text(page(INTRODUCTION), encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
