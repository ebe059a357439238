"""qpalette profile: what each product costs on this machine, for plans that must be fast enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from qpalette.bench.steps import Subject
    from qpalette.core.resume import PartialFigures
    from qpalette.plan import Plan
    from qpalette.plan.profile import LatencyProfile, Launch

    Segments = tuple[tuple[str, int, int], ...]  # spec, out-features, in-features
    Problem = tuple[Segments, int]  # and the batch size
    Part = tuple[int, int]  # out-features, in-features
DEFAULT_SPECS = (
    *(f"tcq-{eighths / 8:g}" for eighths in range(12, 41)),
    *(f"tcq2-{eighths / 8:g}" for eighths in range(12, 41)),
    *(f"vq-{halves / 2:g}" for halves in range(3, 11)),
    *(f"nuq-{bits}" for bits in range(2, 7)),
)
SAVED_EVERY = 20  # launches, which take some seconds


def profile(
    out: Annotated[Path, typer.Argument(help="JSON file to write, for `qpalette plan --profile`.")],
    model: Annotated[
        str | None, typer.Option(help="Model whose linears are measured: directory, .gguf or Hub id.")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Linears that read one input, such as 4096x4096+1024x4096+1024x4096; instead of a model."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")] = "1",
    spec: Annotated[list[str] | None, typer.Option(help="Only these quantizers.")] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head", metavar="S", help="With --model: its output head is quantized so.  [default: left alone]"
        ),
    ] = None,
    constant: Annotated[
        str | None,
        typer.Option(
            help="Milliseconds of a step besides the linears, the head counted: one, or one for each batch.  "
            "[default: measured on --model]"
        ),
    ] = None,
    attention: Annotated[
        str | None, typer.Option("--attention", metavar="A", help="transformers' attn_implementation, or grouped.")
    ] = None,
    device: Annotated[str, typer.Option(help="Such as cuda or cpu.")] = "cuda",
) -> None:
    """Measure the fused products of a model on a device: every shape alone, each group as one launch, the output head.

    Weights are random, and cold; launches have the rotation of their input with them, and on a GPU are replayed in a
    CUDA graph. What a step costs besides is measured on whole steps of the model after 1024 tokens, on a GPU compiled.
    An interrupted measurement goes on from OUT.partial.

    Example: [bold]qpalette profile h100.json --model meta-llama/Llama-3.1-8B --batch 1,8[/]
    """
    from qpalette.bench.steps import STEPS_ON, Subject
    from qpalette.cli.output import check_folder, write_text
    from qpalette.codes import parse_spec
    from qpalette.core.errors import InputError
    from qpalette.core.resume import PartialFigures
    from qpalette.plan.profile import LatencyProfile
    from qpalette.runtime.device import device_name, parse_device

    where = parse_device(device)
    if where.type not in STEPS_ON:
        raise InputError(f"a profile is measured on {' or '.join(STEPS_ON)}, and {device} is neither")
    if (model is None) == (not group):
        raise InputError("give either --model, or --group such as --group 4096x4096+1024x4096+1024x4096")
    if model is None and (constant is None or head is not None):
        raise InputError("--group times no whole step: give its --constant, such as 0.8 milliseconds, and no --head")
    specs = [parse_spec(name).name for name in spec or DEFAULT_SPECS]
    batches = [_number(text, "--batch") for text in batch.split(",")]
    given = None if constant is None else _constants(constant, batches)
    subject = None if model is None else Subject(model, head and parse_spec(head).name)
    plans = subject.probes(specs) if subject is not None and given is None else {}
    groups = subject.launches if subject is not None else [_parse_group(text) for text in group or ()]
    problems = [(_segments(parts, name), size) for parts in _launches(groups) for name in specs for size in batches]
    check_folder(out)
    name = device_name(where)
    partial = PartialFigures(out.with_name(out.name + ".partial"), {"device": name})
    result = LatencyProfile(name, given or 0.0, _measure_all(problems, where, partial))
    if subject is not None and plans:
        result = _completed(subject, plans, result, where, attention, partial)
    write_text(out, result.to_json())
    partial.remove()
    typer.echo(f"{out}: {len(result.launches)} launches on {name}")


def _completed(
    subject: Subject,
    plans: Mapping[str, Plan],
    measured: LatencyProfile,
    device: torch.device,
    attention: str | None,
    partial: PartialFigures,
) -> LatencyProfile:
    steps = subject.step_seconds(device, attention, partial)
    head = {batch: subject.head_seconds(batch, device) for batch in measured.batches}
    return subject.complete(measured, plans, steps, head)


def _measure_all(problems: Sequence[Problem], device: torch.device, partial: PartialFigures) -> tuple[Launch, ...]:
    """Seconds are kept in `partial` from time to time; what is there is not measured again."""
    from qpalette.bench.probes import launch_seconds
    from qpalette.cli.output import step_bar
    from qpalette.plan.profile import Launch

    launches: list[Launch] = []
    with step_bar("measuring") as bar:
        for done, (segments, batch) in enumerate(problems):
            bar.show(done, len(problems))
            key = f"{batch} x {segments}"
            if key not in partial.figures:
                partial.figures[key] = launch_seconds(segments, batch, device)
                if len(partial.figures) % SAVED_EVERY == 0:
                    partial.save()
            launches.append(Launch(segments, batch, partial.figures[key]))
    return tuple(launches)


def _segments(parts: Sequence[Part], spec: str) -> Segments:
    return tuple((spec, rows, columns) for rows, columns in parts)


def _constants(text: str, batches: Sequence[int]) -> float | dict[int, float]:
    """Seconds, from milliseconds."""
    from qpalette.core.errors import InputError

    try:
        values = [float(value) / 1e3 for value in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value < math.inf for value in values):
        raise InputError(f"--constant {text}: give milliseconds, such as 0.8 or, for two batches, 0.8,1.4")
    if len(values) not in (1, len(batches)):
        raise InputError(f"--constant {text}: give one, or as many as batches: {len(batches)}")
    return values[0] if len(values) == 1 else dict(zip(batches, values, strict=True))


def _launches(groups: Sequence[tuple[Part, ...]]) -> list[tuple[Part, ...]]:
    """Each group as one launch, and each of its shapes alone, once."""

    def every() -> Iterator[tuple[Part, ...]]:
        for group in groups:
            yield from ((part,) for part in group)
            yield group

    return list(dict.fromkeys(every()))


def _parse_group(text: str) -> tuple[Part, ...]:
    from qpalette.core.errors import InputError

    parts = []
    for part in text.split("+"):
        rows, _, columns = part.partition("x")
        parts.append((_number(rows, "--group"), _number(columns, "--group")))
    if len({columns for _, columns in parts}) > 1:
        raise InputError(f"--group {text}: linears that read one input have the same number of columns")
    return tuple(parts)


def _number(text: str, option: str) -> int:
    from qpalette.core.errors import InputError

    if not text.strip().isdecimal() or int(text) < 1:
        raise InputError(f"{option}: '{text}' is no positive whole number")
    return int(text)
