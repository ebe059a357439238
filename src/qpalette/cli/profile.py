"""qpalette profile: what each product costs on this GPU, for plans that must be fast enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qpalette.plan.profile import Launch

    Part = tuple[int, int]  # out-features, in-features
DEFAULT_SPECS = (
    *(f"tcq-{eighths / 8:g}" for eighths in range(12, 41, 2)),
    *(f"tcq2-{eighths / 8:g}" for eighths in range(12, 33, 2)),
    *("vq-2", "vq-2.5", "vq-3", "vq-3.5", "vq-4", "nuq-2", "nuq-3", "nuq-4", "nuq-5"),
)


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
    constant: Annotated[
        float, typer.Option(help="Milliseconds per token besides the linears (qpalette bench --breakdown).", min=0)
    ] = 0.0,
    device: Annotated[str, typer.Option(help="CUDA device.")] = "cuda",
) -> None:
    """Measure the fused products of a model on a GPU: every shape alone and each group as one launch.

    Weights are random, and cold; launches are replayed in a CUDA graph, each with the rotation of its input.

    Example: [bold]qpalette profile h100.json --model meta-llama/Llama-3.1-8B --batch 1,8[/]
    """
    import torch

    from qpalette.cli.output import step_bar
    from qpalette.core.errors import InputError
    from qpalette.kernels.device import parse_device
    from qpalette.plan.profile import LatencyProfile
    from qpalette.quantizers import parse_spec

    where = parse_device(device)
    if where.type != "cuda":
        raise InputError(f"a profile is measured on a CUDA device, and {device} is none")
    if (model is None) == (not group):
        raise InputError("give either --model, or --group such as --group 4096x4096+1024x4096+1024x4096")
    specs = [parse_spec(name).name for name in spec or DEFAULT_SPECS]
    batches = [_number(text, "--batch") for text in batch.split(",")]
    groups = _groups_of_model(model) if model is not None else [_parse_group(text) for text in group or ()]
    problems = [(parts, name, size) for parts in _launches(groups) for name in specs for size in batches]
    launches: list[Launch] = []
    with step_bar("measuring") as bar:
        for done, (parts, name, size) in enumerate(problems):
            bar.show(done, len(problems))
            launches.append(_measure(parts, name, size, where))
    result = LatencyProfile(torch.cuda.get_device_name(where), constant / 1e3, tuple(launches))
    partial = out.with_name(out.name + ".partial")
    partial.write_text(result.to_json(), encoding="utf-8")
    partial.replace(out)
    typer.echo(f"{out}: {len(launches)} launches on {result.device}")


def _measure(parts: Sequence[Part], spec: str, batch: int, device: object) -> Launch:
    import torch

    from qpalette.backends.cuda.probe import launch_seconds
    from qpalette.plan.profile import Launch

    segments = tuple((spec, rows, columns) for rows, columns in parts)
    seconds = launch_seconds(segments, batch, torch.device(str(device)), with_rotation=True)
    return Launch(segments, batch, seconds)


def _groups_of_model(model: str) -> list[tuple[Part, ...]]:
    from qpalette.checkpoint import find_groups, open_checkpoint

    groups = find_groups(open_checkpoint(model)).groups
    return [tuple((linear.out_features, linear.in_features) for linear in group.linears) for group in groups]


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
