"""Tokens/s on the processor beside llama.cpp's, in one run; and with a text, KL to the same original.

    python benchmarks/cpu_peers.py [--llama DIR] [--threads 2] [--rounds 5] [--spec tcq-4 ...]
    python benchmarks/cpu_peers.py --model MODEL --text FILE [--windows 4] [--also embed_tokens] [--work DIR]
                                   [--peer Q4_K_M ...] [--artifact OUT ...]
    python benchmarks/cpu_peers.py --processor-time

Without a model: random weights of a Llama of 503 million (`SYNTHETIC`). With one, a GGUF file of 16-bit floats or a
checkpoint of transformers, of which one is written (a Llama or Qwen2): peers'
files are made of it by their own llama-quantize, and ours by `qpalette.quantize`; an --artifact is ours, too, made
before of the same model, such as a planned one. Bits are those of a whole file over the model's weights; KL is that of
ours as it runs here, bytes and all, of theirs with their weights in float32. All take turns, round by round, and the
median counts. Ours are what `generate` gives a user, theirs what llama-bench prints (tg, pp). The tools are looked
for in --llama and on the PATH. Where others use the machine, --processor-time counts seconds of one thread's processor
time: theirs are differences of whole runs of two lengths. Building them:

    pip download --no-binary :all: --no-deps llama-cpp-python
    cmake in its vendor/llama.cpp, CMAKE_BUILD_TYPE=Release, targets llama-bench and llama-quantize
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gguf_files import write_checkpoint, write_random
from report import processor, report
from transformers import AutoConfig

import qpalette
from qpalette.bench.generate import make_fast, measure_generate
from qpalette.bench.models import Candidate, from_config, from_directory, groups_of
from qpalette.core.environment import CPU_BYTES
from qpalette.evaluate import evaluate_models, load_model, token_windows
from qpalette.plan.plan import uniform_plan

SYNTHETIC: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
SPECS = ["tcq-4", "tcq-3", "tcq-2", "nuq-4", "vq-3"]
PEERS = ["Q4_0", "Q2_K"]
YARDSTICK = "llama.cpp Q4_0"
CONTEXT, PROMPT = 16, 512  # tokens before what is decoded; tokens of a prefill
SHORTEST = 11  # new tokens that the harness takes


Clock = Callable[[], float]


@dataclass
class Contestant:
    """measure: decode and prefill, tokens/s."""

    name: str
    measure: Callable[[], tuple[float, float]]
    megabytes: float | None = None
    bits: float | None = None
    kl: float | None = None
    speeds: list[tuple[float, float]] = field(default_factory=list)


def find(tool: str, llama: Path | None) -> str | None:
    places = [str(place) for place in (llama, llama and llama / "bin", llama and llama / "build" / "bin") if place]
    return shutil.which(tool, path=os.pathsep.join(places)) or shutil.which(tool)


def processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def peer_alone(tool: str, file: Path, name: str, steps: int) -> Contestant:
    """By processor time, on one thread."""
    command = [tool, "-m", str(file), "-t", "1", "-r", "1", "--no-warmup"]

    def speed(more: int, fewer: int, *arguments: str) -> float:
        few, many = (processor_seconds([*command, *arguments, str(count)]) for count in (fewer, more))
        return (more - fewer) / (many - few)

    def measure() -> tuple[float, float]:
        return speed(steps + SHORTEST, SHORTEST, "-p", "0", "-n"), speed(PROMPT, PROMPT // 2, "-n", "0", "-p")

    return Contestant(name, measure, file.stat().st_size / 1e6)


def peer(tool: str, file: Path, name: str, threads: int, steps: int) -> Contestant:
    command = [tool, "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json"]

    def measure() -> tuple[float, float]:
        printed = subprocess.run([*command, "-n", str(steps), "-p", str(PROMPT)], capture_output=True, check=True)
        speeds = {bool(row["n_gen"]): row["avg_ts"] for row in json.loads(printed.stdout)}
        return speeds[True], speeds[False]

    return Contestant(name, measure, file.stat().st_size / 1e6)


def ours(name: str, candidate: Candidate, steps: int, clock: Clock, megabytes: float | None = None) -> Contestant:
    model = candidate.build()
    make_fast(model, "never")

    def measure() -> tuple[float, float]:
        decode = measure_generate(candidate, model, 1, CONTEXT, steps, 1, clock)
        prefill = measure_generate(candidate, model, 1, PROMPT, SHORTEST, 1, clock)
        return decode.tokens_per_second, prefill.prefill_tokens_per_second

    return Contestant(name, measure, megabytes)


def file_of(model: Path | None, work: Path) -> Path:
    """What llama-quantize reads: the random model, `model` itself, or a file of the checkpoint at `model`."""
    if model is not None and not model.is_dir():
        return model
    file = work / ("synthetic.gguf" if model is None else f"{model.name}-f16.gguf")
    if not file.exists():
        write_random(file, SYNTHETIC) if model is None else write_checkpoint(model, file)
    return file


def peers_of(
    source: Path, types: list[str], llama: Path | None, threads: int, steps: int, clock: Clock, work: Path
) -> list[Any]:
    """A Contestant for each type, and its file; the synthetic model's head in 8 bits, as llama.cpp keeps heads."""
    bench, quantize = find("llama-bench", llama), find("llama-quantize", llama)
    if bench is None or quantize is None:
        print("no llama-bench and llama-quantize: ours alone")
        return []
    made = []
    for kind in types:
        file = work / f"{source.stem}-{kind}.gguf"
        if not file.exists():
            head = ["--token-embedding-type", "q8_0"] if source.stem == "synthetic" else []
            subprocess.run([quantize, *head, str(source), str(file), kind], capture_output=True, check=True)
        name = f"llama.cpp {kind}"
        alone = clock is time.thread_time
        each = peer_alone(bench, file, name, steps) if alone else peer(bench, file, name, threads, steps)
        made.append((each, file))
    return made


def of_synthetic(specs: list[str], dtype: torch.dtype, steps: int, clock: Clock) -> list[Contestant]:
    config = AutoConfig.for_model("llama", **SYNTHETIC)
    plans = {spec: uniform_plan(groups_of(config).groups, spec) for spec in specs}
    where = torch.device("cpu")
    return [
        ours(spec, from_config(spec, config, plan, dtype, where, None), steps, clock) for spec, plan in plans.items()
    ]


def uniform_ones(source: Path, specs: list[str], also: list[str], work: Path) -> dict[str, Path]:
    placed = {spec: work / "-".join([source.stem, spec, *also]) for spec in specs}
    for spec, out in placed.items():
        if not out.exists():
            qpalette.quantize(source, out, spec=spec, also=also)
    return placed


def of_artifacts(placed: dict[str, Path], dtype: torch.dtype, steps: int, clock: Clock) -> list[Any]:
    made = []
    for name, out in placed.items():
        candidate = from_directory(name, str(out), dtype, torch.device("cpu"), None)
        megabytes = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
        made.append((ours(name, candidate, steps, clock, megabytes), out))
    return made


def measure_losses(contestants: list[Any], source: Path, text: Path, windows: int, length: int) -> None:
    original, tokenizer = load_model(source)
    chosen = token_windows(text, tokenizer, length, windows)
    weights = sum(parameter.numel() for parameter in original.parameters())
    for contestant, place in contestants:
        contestant.bits = 8e6 * contestant.megabytes / weights
        contestant.kl = evaluate_models(load_model(place)[0], original, chosen).kl


def rows_of(contestants: list[Contestant], model: str) -> list[dict[str, Any]]:
    def medians(each: Contestant) -> list[float]:
        return [statistics.median(speeds) for speeds in zip(*each.speeds, strict=True)]

    base = next((medians(each) for each in contestants if each.name == YARDSTICK), None)
    rows = []
    for each in contestants:
        decode, prefill = medians(each)
        row: dict[str, Any] = {"model": model, "weights": each.name, "MB": each.megabytes, "bits": each.bits}
        row["KL"] = each.kl
        row |= {"decode tokens/s": decode, "over Q4_0": base and decode / base[0]}
        row |= {"prefill tokens/s": prefill, "prefill over Q4_0": base and prefill / base[1]}
        rows.append(row | {"least": min(speeds[0] for speeds in each.speeds)})
    return rows


def main(
    llama: Annotated[Path | None, typer.Option(help="Where llama.cpp was built.")] = None,
    model: Annotated[Path | None, typer.Option(help="A GGUF file of 16-bit floats, or a Llama or Qwen2.")] = None,
    text: Annotated[Path | None, typer.Option(help="Measures KL, too.")] = None,
    windows: int = 4,
    length: int = 512,
    threads: int = 2,
    rounds: int = 5,
    steps: int = 64,
    spec: Annotated[list[str] | None, typer.Option()] = None,
    peers: Annotated[
        list[str] | None, typer.Option("--peer", help="Types of llama-quantize; Q4_0 is compared to.")
    ] = None,
    also: Annotated[list[str] | None, typer.Option(help="What each --spec packs, too, such as embed_tokens.")] = None,
    artifacts: Annotated[list[Path] | None, typer.Option("--artifact", help="Made of --model before.")] = None,
    dtype: str = "float32",
    work: Annotated[Path, typer.Option(help="Where files go; kept, so that a rerun is quick.")] = Path("out"),
    processor_time: Annotated[bool, typer.Option(help="Of one thread.")] = False,
    name: str = "cpu_peers",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, too.")] = False,
) -> None:
    os.environ.setdefault(CPU_BYTES, "1")  # as the commands do
    threads = 1 if processor_time else threads
    clock = time.thread_time if processor_time else time.perf_counter
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    specs, types, kind = spec or SPECS, peers or PEERS, getattr(torch, dtype)
    source = file_of(model, work)
    others = peers_of(source, types, llama, threads, steps, clock, work)
    if model is None:
        contestants = [each for each, _ in others] + of_synthetic(specs, kind, steps, clock)
    else:
        made = uniform_ones(model, specs, also or [], work) | {each.name: each for each in artifacts or []}
        placed = others + of_artifacts(made, kind, steps, clock)
        contestants = [each for each, _ in placed]
        if text is not None:
            measure_losses(placed, model, text, windows, length)
    facts = {"text": text and text.name, "windows": windows, "length": length, "steps": steps, "dtype": dtype}
    facts["seconds of"] = "a thread's processor time" if processor_time else "passing time"
    for done in range(1, rounds + 1):  # what a run that is cut off has measured is kept
        for each in contestants:
            each.speeds.append(each.measure())
        rows = rows_of(contestants, source.stem)
        report(name, processor(), rows, rounds=done, load=os.getloadavg()[0], **facts)
    if as_json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
