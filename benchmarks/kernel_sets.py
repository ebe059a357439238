"""How many product kernels a plan needs for each batch size, and what it costs to compile them; needs no GPU.

    python benchmarks/kernel_sets.py PLAN                   # a plan of `qpalette plan`
    python benchmarks/kernel_sets.py tcq2-3+tcq-2.5 nuq-3   # or launches: the specs of each

The table is of kernels of the first 1, 2, 4, ... decoders, and of all: how compilation grows. Seconds are of the
processor, so that other programs on the machine count little.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from kernel_report import SHARED
from report import processor, report

from qpalette.backends.cuda.compiler import compile_cubin, resources
from qpalette.backends.cuda.decoder import DecoderSpec, decoder_spec
from qpalette.backends.cuda.decoder_sets import DecoderSets, expect
from qpalette.backends.cuda.multiply import kernel_macros, source_for
from qpalette.backends.cuda.segments import DeviceLimits
from qpalette.plan import Plan


def main(
    launches: Annotated[list[str], typer.Argument(help="A plan, or launches: specs joined by +.")],
    arch: Annotated[str, typer.Option()] = "sm_90",
    batches: Annotated[str, typer.Option()] = "1,8,16",
) -> None:
    found = [launch for argument in launches for launch in launches_of(argument)]
    decoders = sorted({decoder for launch in found for decoder in launch})
    sets = kernels_of(found)
    facts = {"linears": sum(map(len, found)), "launches": len(found), "different launches": len(set(found))}
    facts |= {"decoders": len(decoders), "kernels per batch size": len(sets)}
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    sizes = sorted({n for n in (1, 2, 4, 8, 16, 32) if n < len(decoders)} | {len(decoders)})
    rows = [row_of(decoders[:n], arch, int(batch)) for batch in batches.split(",") for n in sizes]
    of = [Path(argument).name for argument in launches]
    report("kernel_sets", f"{processor()}, compiler alone", rows, of=of, arch=arch, **facts)


def launches_of(argument: str) -> list[tuple[DecoderSpec, ...]]:
    """Of a plan that names none, each linear is one: how many kernels there are does not depend on it."""
    if not Path(argument).is_file():
        return [decoders_of(argument.split("+"))]
    plan = Plan.read(argument)
    named = {name for launch in plan.launches for name in launch}
    alone = [(name,) for name in plan.specs if name not in named]
    return [decoders_of([plan.specs[name] for name in launch]) for launch in [*plan.launches, *alone]]


def decoders_of(specs: Sequence[str]) -> tuple[DecoderSpec, ...]:
    found = tuple(map(decoder_spec, specs))
    return tuple(decoder for decoder in found if decoder is not None)


def kernels_of(launches: Sequence[tuple[DecoderSpec, ...]]) -> set[tuple[DecoderSpec, ...]]:
    """As `multiply` chooses them when the whole model is loaded before its first product."""
    codes = [(torch.empty(0), decoder) for launch in launches for decoder in launch]
    for tensor, decoder in codes:
        expect(tensor, decoder)
    sets = DecoderSets()
    return {sets.serving(launch) for launch in launches}


def row_of(decoders: Sequence[DecoderSpec], arch: str, batch: int) -> dict[str, Any]:
    limits = DeviceLimits(1, SHARED[arch] * 1024, (int(arch[3:-1]), int(arch[-1])))
    macros = tuple(sorted(kernel_macros(limits, batch).items()))
    start = time.process_time()
    used = resources(source_for(decoders), arch, macros)  # kept nowhere
    seconds = time.process_time() - start
    return {
        "batch": batch,
        "decoders": len(decoders),
        "seconds": round(seconds, 2),
        "registers": used.registers,
        "spilled bytes": used.spilled_bytes,
        "code bytes": len(compile_cubin(source_for(decoders), arch, macros)),
    }


if __name__ == "__main__":
    typer.run(main)
