"""Tables of how close: codes, plans, calibration, tuning, and other people's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from figure_cells import DATA_FREE, gap, kl_of, kl_text, over_bound, scaled
from figure_page import Result, Row, Table, row_of, section

PLANNED = {"plan": "planned, fisher"}
TWO_SIDED = (
    "python benchmarks/two_sided.py MODEL --text TEST --calibration TRAIN --tokens 245760 --draws 4 --device cuda"
)
BITS = ("1.5", "2", "2.5", "3", "3.25", "3.5", "4", "5", "6", "8")


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
        found = [(kl_text(row["KL"]), kl_text(row["predicted KL"])) for row in rows if row["budget"] == bits]
        return found[0] if found else ("", "")

    return Table(
        ("bits per weight, everything counted", "uniform", "planned", "predicted", "planned, calibrated", "predicted"),
        [(b, kl_text(kl), *pair(data_free, b), *pair(calibrated["rows"], b)) for b, kl in uniform.items()],
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
        found = [text for row in calibrated for text in (kl_text(row["KL"]), f"{row['perplexity']:.2f}")] or ["", ""]
        return (free["spec"], f"{free['bits']:.3f}", kl_text(free["KL"]), f"{free['perplexity']:.2f}", *found)

    columns = ("code", "bits per weight, all counted", "KL, data-free", "perplexity", "KL, calibrated", "perplexity")
    return Table(columns, [*(line(row) for row in rows if row["rounding"] == "data-free"), original])


@section(
    "Tuning on a GPU",
    *("tuning_uniform_2", "tuning_uniform_3", "tuning_planned_3", "tuning_planned_3.25"),
    command=f"""{TWO_SIDED}
python benchmarks/tuning.py MODEL OUT --text TRAIN --test TEST --steps 100 --device cuda""",
)
def tuning_on_a_gpu(*results: Result) -> Table:
    """SmolLM2-135M-Instruct rounded on both sides, as below, then tuned on the training text; KL on the first 16
    windows of the test text. Seconds are of a GPU that other measurements shared."""
    rows = [row for result in results for row in result["rows"]]
    kl = {"KL before": kl_of("KL test before"), "KL": kl_of("KL test")}
    return Table.of(rows, {"model": "{artifact}", "bits per weight": "{bits:.3f}", **kl, "seconds": "{seconds:.0f}"})


@section(
    "Tuning", "tuning_small_cpu", command="qpalette tune OUT --reference MODEL --text FILE --out TUNED  # and so on"
)
def tuning(result: Result) -> Table:
    """A few steps on one busy processor; measured on 4 windows of text that tuning never saw."""
    rows = [{"name": "tcq-3-L12", **result["before"]}, {"name": "tuned", **result["after"]}]
    bits, perplexity = "{bits_per_weight:.3f}", "{perplexity:.2f}"
    return Table.of(rows, {"": "{name}", "bits per weight": bits, "KL": kl_of("kl"), "perplexity": perplexity})


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
        return [gap(measured, f"{family}-{bits}") if f"{family}-{bits}" in specs else "" for bits in BITS]

    known = {f"{row['bits']:g}": over_bound(row) for row in published["rows"] if row["family"] == "tcq"}
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
    figures = {"KL": kl_of("KL"), "standard error": "{KL stderr:.4f}", "perplexity": "{perplexity:.2f}"}
    return Table.of(result["rows"], {"rotation": "{rotation}", "code": "{spec}", **figures})


@section(
    "Rounding on both sides",
    *("two_sided", "two_sided_one_draw"),
    command=TWO_SIDED,
)
def both_sides(*results: Result) -> Table:
    """SmolLM2-135M-Instruct, one code for all linears or planned, embeddings as they are, no tuning; KL on the first
    16 windows of the WikiText-2 test text, calibrated on seven eighths of the first megabyte of the training text. What
    a plan predicts is of eight windows from the rest of it, "held-out KL" is measured there."""
    rows = [row | {"draws": result["draws"]} for result in results for row in result["rows"]]
    kl = {"KL": kl_of("KL"), "standard error": "{KL stderr:.4f}", "predicted": kl_of("predicted")}
    kl |= {"held-out KL": kl_of("KL, held-out text")}
    return Table.of(
        sorted(rows, key=lambda row: row["bits"]),
        {"code, labels per token": "{choice}, {draws}", "bits per weight, all counted": "{bits:.3f}", **kl},
    )


@section(
    "Calibrated on what the model writes",
    *("two_sided_sampled", "two_sided_sampled_rates", "two_sided_sampled_4"),
    command="""python benchmarks/two_sided.py MODEL --text TEST --calibration TRAIN --sampled --device cuda
python benchmarks/two_sided.py MODEL --text TEST --calibration TRAIN --sampled --device cuda \\
    --rounding "one side, equalized" --rounding "both sides, equalized" --uniform 3 \\
    --calibrated "both sides, sampled text" --planned 3 --planned 2.5 --name two_sided_sampled_rates
python benchmarks/two_sided.py MODEL --text TEST --calibration TRAIN --sampled --device cuda \\
    --rounding "both sides, equalized" --uniform 3 --calibrated "both sides, sampled text" --planned 4 \\
    --name two_sided_sampled_4""",
)
def sampled(*results: Result) -> Table:
    """What a plan costs on either text, calibrated on text of the model's own; one code, calibrated on the training
    text, beside it. Three runs, each with a text of its own; all but the first shared a GPU with others' work. What the
    training text gives at these rates is in the table "Rounding on both sides"."""
    kl = {"KL, test text": kl_of("KL"), "KL, text of the model's own": kl_of("KL, sampled text")}
    kl |= {"predicted": kl_of("predicted")}
    columns = {"code": "{choice}", "rounding": "{rounding}", "bits per weight, all counted": "{bits:.3f}"}
    return Table.of([row for result in results for row in result["rows"]], columns | kl)


@section(
    "Both sides of an 8B",
    *("two_sided_8b", "two_sided_8b_layers"),
    command="""python benchmarks/two_sided.py --llama-8b --device cuda --dtype bfloat16
python benchmarks/two_sided.py --llama-8b --layers 2 --device cuda --dtype bfloat16 --name two_sided_8b_layers""",
)
def eight_billion(*results: Result) -> Table:
    """A random model of Llama-3.1-8B's shapes, 64 windows of 2048 tokens, a plan of 3.25 bits; all 32 layers, whose
    rounding was not run to its end, and two of them, beside which a processor was busy."""
    rows = [row | {"layers": result.get("layers", 32)} for result in results for row in result["rows"]]
    return Table.of(
        rows,
        {"layers": "{layers}", "step": "{step}", "seconds": "{seconds:.1f}", "GiB": "{peak GPU memory, GiB:.1f}"},
    )


@section(
    "The one command",
    *("road_one_command_cpu", "road_one_command_gpu"),
    command="python benchmarks/road.py MODEL --one-command --bits 3 --text TEST  # and with --device cuda",
)
def one_command(*results: Result) -> Table:
    """`qpalette quantize MODEL OUT --bits 3`, SmolLM2-135M-Instruct on two cores and on an H200, embeddings counted and
    packed. The model writes the text that it is calibrated and tuned on, more of it on a GPU; KL is of the WikiText-2
    test text. While it tuned on the two cores, others worked on the machine."""
    rows = [row | {"device": result["device"]} for result in results for row in result["rows"]]
    minutes, bits = scaled("seconds", 1 / 60, 1), "{bits_per_weight:.3f}"
    kl = {"KL": kl_of("kl"), "predicted, on its own text": kl_of("predicted_kl")}
    return Table.of(rows, {"": "{device}", "minutes": minutes, "bits per weight": bits, **kl})


@section(
    "SmolLM2 at several sizes, beside llama.cpp and bitsandbytes",
    "compare_peers",
    command="""python benchmarks/peers.py MODEL --text TEST --other MODEL-Q2_K.gguf --other MODEL-Q3_K_M.gguf ...
    # ours made before, by qpalette quantize MODEL OUT --bits B --device cuda""",
)
def compared(result: Result) -> Table:
    """Ours by the one command, on text of the model's own. All bytes of the weight files over the weights of the
    original; KL in nats per token, its mean and its median. llama.cpp's K types need rows of a multiple of 256 weights:
    for others its tool takes larger types."""
    return Table.of(
        result["models"],
        {
            "model": lambda row: Path(row["model"]).name,
            "MB": scaled("file_bytes", 1e-6, 1),
            "bits per weight": "{bits_per_weight:.3f}",
            "KL": kl_of("kl"),
            "median": kl_of("kl_median"),
            "top-1, %": lambda row: f"{100 * row['top1']:.1f}" if row["top1"] is not None else "",
            "perplexity": "{perplexity:.2f}",
        },
    )


def _caches(result: Result) -> Table:
    kl = {"KL": kl_of("kl"), "standard error": "{kl_stderr:.5f}", "99.9 %": "{kl_999:.2f}"}
    predicted = {"predicted": kl_of("predicted_cache_kl"), "the same token": "{top1:.3f}"}
    rows = sorted(result["rows"], key=lambda row: (row["cache_bits"], row["kl"]))
    return Table.of(rows, {"cache": "{cache}", "bits per number": "{cache_bits:.3f}", **kl, **predicted})


CACHES = "python benchmarks/cache.py MODEL --text TEST --calibration TRAIN --device cuda --name"


@section("Caches of codes", "cache_smollm2", command=f"{CACHES} cache_smollm2")
def caches(result: Result) -> Table:
    """SmolLM2-135M-Instruct in 16 bits, 8 windows of 2048 tokens of the WikiText-2 test text, every token read through
    the cache, the first four exact; transforms of 4096 tokens of the training text. Bits of codes and scales; the last
    32 tokens that KIVI keeps as they are do not count."""
    return _caches(result)


@section(
    "Caches of codes, calibrated on longer windows",
    "cache_windows",
    command="""python benchmarks/cache.py MODEL --text TEST --calibration TRAIN --no-prediction --spec vq-2.5 \\
    --spec vq-3 --spec vq-4 --spec exl3-3,sinks=4 --spec q4_0,sinks=4 --spec turboquant-4,sinks=4 \\
    --name cache_windows""",
)
def cache_windows(result: Result) -> Table:
    """The same on two cores, transforms of 16 windows of 2048 tokens of the training text, which `--cache-text` and
    this benchmark take now: the tables before and after this one are of 16 windows of 256."""
    return _caches(result)


@section(
    "Caches of codes over 8192 tokens",
    "cache_8k",
    command=f"{CACHES} cache_8k --windows 4 --length 8192",
    pending=True,
)
def long_caches(result: Result) -> Table:
    """The same in 4 windows of 8192 tokens."""
    return _caches(result)


@section(
    "Caches of codes where keys have biases",
    "cache_biases",
    command="""python benchmarks/mixture.py --dense --train TRAIN --steps 600 --device cuda --work DIR
python benchmarks/cache.py DIR/model --text TEST --calibration TRAIN --device cuda --name cache_biases""",
    pending=True,
)
def biased_caches(result: Result) -> Table:
    """The same 8 windows of 2048 tokens, of a Qwen2 of some 14 million parameters that was trained on the first
    megabyte of WikiText-2; the biases of its keys began at a standard deviation of 8."""
    return _caches(result)


@section(
    "One plan for weights and cache",
    "joint",
    command="python benchmarks/joint.py MODEL --text TEST --calibration TRAIN --device cuda",
    pending=True,
)
def joint(result: Result) -> Table:
    """SmolLM2-135M-Instruct, embeddings as they are, rounded data-free: one plan for linears and cache, which has one
    code ("joint", what `qpalette plan` makes), one in which each stream of the cache has a code of its own, and a cache
    that is planned at weights of one code, the best such by prediction. The budget is for a number of either, and a
    cache of so many tokens; KL on windows of 2048 tokens of the WikiText-2 test text, all read through the cache. Keys
    were calibrated on windows of 256 tokens, which are as long as those of the test since."""
    kl = {"KL": kl_of("KL"), "standard error": "{KL stderr:.4f}", "predicted": kl_of("predicted KL")}
    what = {"plan": "{plan}", "tokens": "{context}", "bits of a number": "{budget:g}"}
    sizes = {"MB": "{MB:.1f}", "of it weights": "{weights MB:.1f}", "bits of a cached number": "{cache bits:.3f}"}
    return Table.of(result["rows"], what | sizes | kl)


@section(
    "A mixture of experts",
    "mixture",
    command="python benchmarks/mixture.py --train TRAIN --text TEST --steps 1500 --device cuda",
)
def mixture(result: Result) -> Table:
    """A Qwen3-MoE of 8 experts, trained on the first megabyte of WikiText-2 until it knew it by heart, KL on the test
    text. What is predicted is of its own text, and too low by as much as that is easier: here only the order of the
    rows says something."""
    kl = {"KL": kl_of("KL"), "predicted": kl_of("predicted")}
    return Table.of(result["rows"], {"experts": "{choice}", "bits per weight, all counted": "{bits:.3f}", **kl})
