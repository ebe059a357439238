"""qpalette export: a quantized model, or its plan, for tools that do not know it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpalette.cli.output import print_facts, print_json
from qpalette.core.text import count, size

if TYPE_CHECKING:
    from qpalette.core.records import LinearRecord
    from qpalette.formats import Artifact

FLOATS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
PLANS = ("llama.cpp", "exllamav3")


def export(
    artifact: Annotated[str, typer.Argument(help="A quantized directory; for a plan, a plan file will do.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory or file to write; it must not exist.")],
    to: Annotated[
        str, typer.Option("--to", help=f"{', '.join(FLOATS)}: plain safetensors; {' or '.join(PLANS)}: its plan.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Of a plan file: the model that it is for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Decode a quantized model into plain safetensors, or spell its plan for another quantizer.

    llama.cpp: lines for llama-quantize --tensor-type-file. exllamav3: YAML for util/recompile.py --override.

    Example: [bold]qpalette export OUT PLAIN --to bf16[/]
    """
    if to in FLOATS:
        facts = _export_weights(artifact, out, FLOATS[to])
    elif to in PLANS:
        facts = _export_plan(artifact, out, to, model)
    else:
        raise typer.BadParameter(f"--to is one of {', '.join([*FLOATS, *PLANS])}")
    if as_json:
        print_json({"output": out, **facts})
    else:
        print_facts(str(out), {name: str(value) for name, value in facts.items()})


def _export_weights(artifact: str, out: Path, dtype: str) -> dict[str, object]:
    import torch

    from qpalette.formats import DequantizedCheckpoint, open_artifact
    from qpalette.storage import export_checkpoint, local_path

    plain = DequantizedCheckpoint(open_artifact(local_path(artifact)), getattr(torch, dtype))
    export_checkpoint(plain, out)
    return {"type": dtype, "tensors": len(plain.tensors), "size": size(plain.total_bytes)}


def _export_plan(source: str, out: Path, to: str, model: str | None) -> dict[str, object]:
    from qpalette.core.errors import InputError
    from qpalette.integrations.foreign_plans import exllama_plan, llama_cpp_plan

    if out.exists():
        raise InputError(f"{out} exists already; choose another file")
    config, records, name = _planned(Path(source).expanduser(), model)
    plan = llama_cpp_plan(config, records) if to == "llama.cpp" else exllama_plan(records, name)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.write_text(plan.text, encoding="utf-8", newline="\n")
    os.replace(temporary, out)
    bits = {"their bits per weight": f"{plan.bits:.3f}", "planned": f"{plan.planned_bits:.3f}"}
    return {"tensors": count(plan.tensors), **bits}


def _planned(source: Path, model: str | None) -> tuple[dict[str, object], dict[str, LinearRecord], str]:
    """(the model's config, linear -> what is planned for it, the model's name)."""
    from qpalette.core.errors import InputError
    from qpalette.formats import open_artifact
    from qpalette.pipeline.jobs import make_jobs
    from qpalette.plan import Plan
    from qpalette.storage import open_checkpoint

    if source.is_dir():
        artifact: Artifact = open_artifact(source)
        return dict(artifact.config), dict(artifact.records), source.name
    if model is None:
        raise InputError(f"{source} is no quantized directory; for a plan file give --model too")
    checkpoint = open_checkpoint(model)
    jobs = make_jobs(checkpoint, Plan.from_json(source.read_text(encoding="utf-8")))
    return checkpoint.config, {job.name: job.record for job in jobs}, Path(model).name
