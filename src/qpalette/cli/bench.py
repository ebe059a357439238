"""qpalette bench: tokens per second, latency and memory, beside the original in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpalette.cli.output import (
    check_folder,
    print_json,
    print_note,
    print_table,
    quiet_transformers,
    step_bar,
    write_json,
)
from qpalette.cli.prefill import HELP as PREFILL_HELP
from qpalette.core.text import size

if TYPE_CHECKING:
    from qpalette.bench import Candidate, Share, Speed
    from qpalette.kvcache import CachePlan
    from qpalette.plan import Plan

BATCHES, CONTEXTS = (1, 2, 4, 8, 16), (1024,)


Model = Annotated[str | None, typer.Argument(metavar="[OUT]", help="The quantized directory (or any other model).")]
Config = Annotated[
    str | None,
    typer.Option("--config", metavar="C", help="Or random weights: llama-3.1-8b, another preset, a config.json."),
]
Specs = Annotated[
    list[str] | None,
    typer.Option("--spec", metavar="S", help="With --config: the quantizer, such as tcq-3.25. Repeatable."),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="With --config: or a plan.")]
Head = Annotated[str | None, typer.Option("--head", metavar="S", help="With --config: quantize the output head, too.")]
Rotation = Annotated[str, typer.Option("--rotation", help="With --spec: full, block or block-64.")]
Layers = Annotated[
    int | None,
    typer.Option("--layers", metavar="N", help="With --config: the first N layers alone, of a model too large."),
]
Reference = Annotated[
    str | None,
    typer.Option("--reference", metavar="MODEL", help="The original.  [default: random weights of its config]"),
]
Alone = Annotated[bool, typer.Option("--alone", help="Do not time the original.")]
Batches = Annotated[
    list[int] | None, typer.Option("--batch", metavar="N", help="Repeatable.  [default: 1, 2, 4, 8, 16]")
]
Contexts = Annotated[
    list[int] | None, typer.Option("--context", metavar="N", help="Tokens in the cache. Repeatable.  [default: 1024]")
]
Prefills = Annotated[
    int,
    typer.Option(
        "--prefills", metavar="N", help="Timed prompts; the median counts. 0: none, random numbers fill the cache."
    ),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Timed steps; the median counts.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Of the original and of what is not quantized.  [default: float16 on a GPU, bfloat16 on a CPU]"
    ),
]
Device = Annotated[str, typer.Option("--device", help="Such as cpu or cuda.")]
Runner = Annotated[
    str | None,
    typer.Option(
        "--runner",
        help="eager, graph, compile or compile-graph: steps alone; generate: what the command of that name runs.  "
        "[default: compile on a GPU, eager on a CPU]",
    ),
]
Compile = Annotated[
    str, typer.Option("--compile", help="With --runner generate: never, background or now, as `qpalette generate`.")
]
Cache = Annotated[
    list[str] | None,
    typer.Option(
        "--cache",
        metavar="SPEC",
        help="Keep keys and values as codes, those of the original not: vq-3, white:nuq-4, a plan file; none: as they "
        "are. Repeatable.  [default: as OUT says]",
    ),
]
Roads = Annotated[list[str] | None, typer.Option("--prefill", metavar="ROAD", help=f"{PREFILL_HELP} Repeatable.")]
Attention = Annotated[
    str | None, typer.Option("--attention", metavar="A", help="transformers' attn_implementation, or grouped.")
]
Breakdown = Annotated[bool, typer.Option("--breakdown", help="Where the time of a step goes, at the first batch size.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="A .png, .svg or .pdf.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Keep what --json prints there, after every measurement."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]


def bench(
    model: Model = None,
    config: Config = None,
    spec: Specs = None,
    plan: PlanFile = None,
    head: Head = None,
    rotation: Rotation = "full",
    layers: Layers = None,
    reference: Reference = None,
    alone: Alone = False,
    batch: Batches = None,
    context: Contexts = None,
    steps: Steps = 64,
    prefills: Prefills = 3,
    dtype: Dtype = None,
    device: Device = "cpu",
    runner: Runner = None,
    compile: Compile = "never",
    cache: Cache = None,
    prefill: Roads = None,
    attention: Attention = None,
    with_breakdown: Breakdown = False,
    plot: Plot = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time decoding and prefill with a static cache, and the original the same way.

    A --config without quantizers times the original by itself.

    Example: [bold]qpalette bench --config llama-3.1-8b --spec tcq-3.25 --device cuda --breakdown[/]
    """
    from qpalette.bench import default_runner
    from qpalette.cli.answer import parse_dtype
    from qpalette.core.errors import InputError
    from qpalette.runtime import check_road
    from qpalette.runtime.device import parse_device

    batches, contexts = tuple(batch or BATCHES), tuple(context or CONTEXTS)
    _check_numbers(batches, contexts, steps, prefills)
    _check_runner(runner, compile, steps, with_breakdown, prefills)
    _check_files(plot, out, contexts)
    if layers is not None and (config is None or reference is not None):
        raise InputError("--layers goes with --config and random weights")
    quiet_transformers()
    where = parse_device(device)
    kind = dtype or ("float16" if where.type == "cuda" else "bfloat16")
    asked: list[str | None] = [*cache] if cache else [None]
    roads: list[str | None] = [*map(check_road, prefill)] if prefill else [None]
    common, caches = (parse_dtype(kind), where, attention), tuple(_cache(one, model) for one in asked)
    candidates = _quantized(model, config, spec or [], plan, head, rotation, layers, common)
    candidates = [replace(candidate, caches=caches, road=road) for candidate in candidates for road in roads]
    if not alone:
        candidates.insert(0, _original(model, config, reference, kind, layers, common))
    if not candidates:
        raise InputError("--alone with a bare --config leaves nothing to time: add --spec or --plan")
    how = (batches, contexts, steps, runner or default_runner(where), with_breakdown, compile, prefills, _too_large)
    speeds, shares = _measure(candidates, how, where, out)
    _tell(speeds, shares, where, plot, as_json)


def _check_numbers(batches: tuple[int, ...], contexts: tuple[int, ...], steps: int, prefills: int) -> None:
    from qpalette.core.errors import InputError

    if min(*batches, *contexts, steps, prefills + 1) < 1:
        raise InputError("batch sizes, --context and --steps must be at least 1, --prefills at least 0")


def _check_files(plot: Path | None, out: Path | None, contexts: tuple[int, ...]) -> None:
    if plot is not None:
        from qpalette.core.errors import InputError
        from qpalette.report.pictures import check_picture

        check_picture(plot)
        if len(contexts) > 1:
            raise InputError("--plot draws one --context")
    if out is not None:
        check_folder(out)


def _too_large(what: str) -> None:
    print_note(f"{what}: the device has no memory for it")


def _measure(
    candidates: list[Candidate], how: tuple[Any, ...], device: Any, out: Path | None
) -> tuple[list[Speed], dict[str, list[Share]]]:
    """Speeds, and where a step's time goes by model; `how` is what `measure` takes after the candidates."""
    from qpalette.bench import measure, stages

    speeds: list[Speed] = []
    shares: dict[str, list[Share]] = {}
    batches, contexts = how[:2]
    total = sum(len(candidate.caches) for candidate in candidates) * len(batches) * len(contexts)
    with step_bar("models x batches") as bar:
        for result, parts in measure(candidates, *(*how, stages(bar.tell))):
            speeds.append(result)
            if parts:
                shares[result.model] = parts
            bar.show(len(speeds), total)
            where = f"context {result.context}, batch {result.batch}"
            print_note(f"{result.model}, {where}: {result.tokens_per_second:.1f} tokens/s")
            if out is not None:
                write_json(_report(speeds, shares, device), out)
    return speeds, shares


def _cache(spec: str | None, model: str | None) -> CachePlan | None:
    from qpalette.evaluate.cache import stored_plan
    from qpalette.kvcache import parse_cache
    from qpalette.storage import local_path

    if spec == "none" or (spec is None and model is None):
        return None
    return stored_plan(Path(local_path(str(model)))) if spec is None else parse_cache(spec)


def _check_runner(runner: str | None, compile: str, steps: int, with_breakdown: bool, prefills: int) -> None:
    from qpalette.bench import GENERATE, check_steps
    from qpalette.core.errors import InputError
    from qpalette.generation import check_mode

    check_mode(compile)
    if runner == GENERATE:
        check_steps(steps)
        if with_breakdown:
            raise InputError(f"--breakdown looks into a step alone: take another runner than {GENERATE}")
        if not prefills:
            raise InputError(f"runner {GENERATE} reads its prompts: take another one for --prefills 0")
    elif compile != "never":
        raise InputError(f"--compile goes with --runner {GENERATE}: the other runners say themselves what is compiled")


def _tell(speeds: list[Speed], shares: dict[str, list[Share]], device: Any, plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        from qpalette.report.bench_plot import draw_speeds

        draw_speeds(speeds, shares, plot, device_name(device))
    if as_json:
        print_json(_report(speeds, shares, device))
    else:
        _print(speeds, shares, device)


def _quantized(
    model: str | None,
    config: str | None,
    specs: list[str],
    plan: Path | None,
    head: str | None,
    rotation: str,
    layers: int | None,
    common: tuple[Any, ...],
) -> list[Candidate]:
    """None when a config comes without quantizers: the original is timed by itself then."""
    from qpalette.bench import from_config, from_directory
    from qpalette.core.errors import InputError

    if (model is None) == (config is None):
        raise InputError("give either a model or --config, such as --config llama-3.1-8b")
    if model is not None:
        if specs or plan or head:
            raise InputError("--spec, --plan and --head go with --config: a model on disk has its own quantizers")
        return [from_directory(model, model, *common)]
    if specs and plan is not None:
        raise InputError("give either --spec, such as tcq-3.25, or --plan")
    shape, title = _shape(str(config), layers)
    plans = {str(plan): _plan(shape, None, plan, head, rotation)} if plan is not None else {}
    plans |= {spec: _plan(shape, spec, None, head, rotation) for spec in specs}
    return [from_config(f"{title} {name}", shape, chosen, *common) for name, chosen in plans.items()]


def _shape(config: str, layers: int | None) -> tuple[Any, str]:
    """A model of random weights, and what it is called."""
    from qpalette.bench import read_config
    from qpalette.bench.models import first_layers

    found = read_config(config)
    if layers is None:
        return found, config
    return first_layers(found, layers), f"{config}, {layers} of {found.num_hidden_layers} layers,"


def _plan(shape: Any, spec: str | None, plan: Path | None, head: str | None, rotation: str) -> Plan:
    from qpalette.bench.models import groups_of, with_head
    from qpalette.evaluate.windows import read_text
    from qpalette.plan import Plan, uniform_plan

    if plan is not None:
        chosen = Plan.from_json(read_text(plan))
    else:
        chosen = uniform_plan(groups_of(shape).groups, str(spec), rotation)
    return chosen if head is None else with_head(chosen, shape, head)


def _original(
    model: str | None,
    config: str | None,
    reference: str | None,
    dtype: str,
    layers: int | None,
    common: tuple[Any, ...],
) -> Candidate:
    """The speed of the original does not depend on its weights: without a reference, they are random."""
    from qpalette.bench import from_config, from_directory, read_config

    if reference is not None:
        return from_directory(f"{reference} {dtype}", reference, *common)
    if model is not None:
        from qpalette.evaluate import is_artifact
        from qpalette.storage import local_path, open_checkpoint, plain_directory

        place = local_path(model)
        if not is_artifact(place):
            return from_directory(f"{model} {dtype}", str(plain_directory(open_checkpoint(place))), *common)
        return from_config(f"{model} {dtype}", read_config(str(place)), None, *common)
    shape, title = _shape(str(config), layers)
    return from_config(f"{title} {dtype}", shape, None, *common)


def _report(speeds: list[Speed], shares: dict[str, list[Share]], device: Any) -> dict[str, Any]:
    from datetime import date

    return {
        "device": device_name(device),
        "date": str(date.today()),
        "versions": _versions(),
        "speeds": [
            _fields(speed)
            | {"tokens_per_second": speed.tokens_per_second}
            | {"prefill_tokens_per_second": speed.prefill_tokens_per_second, "ratio": _ratio(speed, speeds)}
            for speed in speeds
        ],
        "breakdown": shares,
    }


def _fields(speed: Speed) -> dict[str, Any]:
    """All of them; those of the runner "generate", of a cache of codes and of a road for prompts where they exist."""
    from dataclasses import asdict

    own = ("first_token_seconds", "first_tokens_per_second", "warm_seconds", "cache", "prefill")
    return {name: value for name, value in asdict(speed).items() if name not in own or value is not None}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("qpalette", "torch", "transformers")}


def device_name(device: Any) -> str:
    """The GPU's name, or the processor's."""
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _ratio(speed: Speed, speeds: list[Speed]) -> float | None:
    """Tokens per second over the first model's at the same context and batch size; None for that one itself, and where
    it had no memory."""
    alike = (speeds[0].model, speed.context, speed.batch)
    first = next((other for other in speeds if (other.model, other.context, other.batch) == alike), None)
    return None if first is None or first is speed else speed.tokens_per_second / first.tokens_per_second


def _print(speeds: list[Speed], shares: dict[str, list[Share]], device: Any) -> None:
    columns: dict[str, Callable[[Speed], str]] = {
        "model": lambda speed: speed.model + (" (random weights)" if speed.random_weights else ""),
        "context": lambda speed: str(speed.context),
        "batch": lambda speed: str(speed.batch),
        "tokens/s": lambda speed: f"{speed.tokens_per_second:.1f}",
        "ratio": lambda speed: _shown(_ratio(speed, speeds), "{:.2f}"),
        "ms per step": lambda speed: f"{1e3 * speed.decode_seconds:.3f}",
        "prefill tokens/s": lambda speed: _shown(speed.prefill_tokens_per_second, "{:.0f}"),
        "first token": lambda speed: "" if speed.prefill_seconds is None else f"{1e3 * speed.prefill_seconds:.0f} ms",
        "at first": lambda speed: _shown(speed.first_token_seconds, "{:.2f} s"),
        "tokens/s at first": lambda speed: _shown(speed.first_tokens_per_second, "{:.1f}"),
        "warm": lambda speed: _shown(speed.warm_seconds, "{:.2f} s"),
        "weights": lambda speed: size(speed.weight_bytes),
        "peak": lambda speed: "" if speed.peak_bytes is None else size(speed.peak_bytes),
    }
    if all(speed.first_token_seconds is None for speed in speeds):
        for name in ("at first", "tokens/s at first", "warm"):
            del columns[name]
    rows = [tuple(cell(speed) for cell in columns.values()) for speed in speeds]
    first = speeds[0]
    title = f"Decoding on {device_name(device)}, runner {first.runner}"
    caption = "ratio: tokens/s over the first model's at the same context and batch size; medians"
    if "warm" in columns:
        caption += (
            "; at first: the first request, its first token and its speed from the tenth on; warm: until captured"
        )
    print_table(title, tuple(columns), rows, caption=caption)
    for name, parts in shares.items():
        _print_breakdown(name, parts)


def _shown(value: float | None, template: str) -> str:
    return "" if value is None else template.format(value)


def _print_breakdown(name: str, parts: list[Share]) -> None:
    total = sum(part.seconds for part in parts)
    rows = []
    for part in parts:
        longest = ", ".join(f"{kernel[:60]} {1e6 * seconds:.0f}" for kernel, seconds in list(part.kernels.items())[:3])
        rows.append((part.part, f"{1e6 * part.seconds:.0f}", f"{100 * part.seconds / total:.1f} %", longest))
    print_table(f"Where a step goes: {name}", ("part", "us", "share", "longest kernels, us"), rows)
    if total == 0:
        print_note("the profiler saw no kernel: is another profiler attached to the device?")
