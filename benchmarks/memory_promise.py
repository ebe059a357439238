"""`--memory` with `--context`: what is promised, what a model holds at its full context, and what its process takes.

    python benchmarks/memory_promise.py [--hidden 1024] [--layers 4] [--context 2048]

A Llama of random weights is planned for a memory, with a cache of 16 bits and with one of codes, quantized, and run in
a process of its own to the last token of the context, in bfloat16. Tensors are counted; "peak" is the process' largest
resident memory over what Python, torch and compiled kernels take: over that of the same with 64 hidden units, in the
same codes, whose kernels are the same, and with a context of 64 tokens, less its tensors and its cache.
"peak, freed memory given back" is the same where the C library and the vendor's product return at once what was freed
(`GIVING_BACK`), of which they keep some otherwise. Pages of programs and libraries do not count: how many of them are
mapped depends on what else the machine has read. Each runs twice, and the second is measured: to compile kernels takes
memory of its own. Linux alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from memory import write_llama
from report import processor, report

import qpalette
from qpalette.api import cache_maker
from qpalette.core.mapped import resident_bytes
from qpalette.evaluate import load_model
from qpalette.generation import attach
from qpalette.models import find_groups
from qpalette.pipeline.planning import BudgetPlan, even_sensitivities, make_plan
from qpalette.plan import Budget, SensitiveStream, Space, palette_of
from qpalette.storage import Checkpoint, open_checkpoint

WIDTH = 64  # of a head
NEW = 4  # tokens after the prompt
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
PEAKS: dict[str, dict[str, str]] = {"peak": {}, "peak, freed memory given back": GIVING_BACK}  # and the environment


def main(
    hidden: int = 1024,
    layers: int = 4,
    context: int = 2048,
    room: Annotated[float, typer.Option(help="Bits a number of the weights and of a coded cache, about.")] = 3.5,
    run: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if run is not None:
        print(json.dumps(held(run, context)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for coded in (False, True):
            sources = Path(folder, f"model-{coded}"), Path(folder, f"base-{coded}")
            for source, width in zip(sources, (hidden, WIDTH), strict=True):
                write_llama(source, width, layers)
            found = planned(open_checkpoint(sources[0]), context, room, coded)
            row, base = (
                measured(source, found, tokens) for source, tokens in zip(sources, (context, WIDTH), strict=True)
            )
            row |= {peak: row[peak] - (base[peak] - base["tensors"] - base["cache"]) for peak in PEAKS}
            row = {"keys and values": "codes" if coded else "16 bits", "promised": found.memory_bytes, **row}
            rows.append(row)
            report("memory_promise", processor(), rows, hidden=hidden, layers=layers, context=context, unit="bytes")


def measured(source: Path, found: BudgetPlan, context: int) -> dict[str, Any]:
    """Of a model whose linears have the names of the plan."""
    plan, out = source.with_suffix(".json"), source.with_suffix(".packed")
    plan.write_text(found.plan.to_json())
    qpalette.quantize(source, out, plan=plan)
    command = [sys.executable, __file__, "--run", str(out), "--context", str(context)]
    row: dict[str, Any] = {}
    for peak, environment in PEAKS.items():
        for _ in range(2):
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
        told = json.loads(ran.stdout.splitlines()[-1])
        row |= told["held"] | {peak: told["peak"]}
    return row


def planned(checkpoint: Checkpoint, context: int, room: float, coded: bool) -> BudgetPlan:
    known = even_sensitivities(find_groups(checkpoint).groups)
    config = checkpoint.config
    heads, layers = config["num_key_value_heads"], range(config["num_hidden_layers"])
    numbers = sum(linear.shape.weights for linear in known.linears)
    if coded:
        streams = [SensitiveStream(layer, kind, heads, WIDTH, 1e3) for layer in layers for kind in ("keys", "values")]
        known = type(known)(known.linears, known.provenance, streams=tuple(streams))
        numbers += len(streams) * heads * WIDTH * (context + 2 * WIDTH)
    space = Space(palette_of(families=("nuq",)))

    def plan(memory: int) -> BudgetPlan:
        return make_plan(known, Budget(memory=memory), space, checkpoint, context=context)

    return plan(plan(1 << 40).overhead.memory + int(room * numbers / 8))


def held(directory: Path, context: int) -> dict[str, Any]:
    model = load_model(str(directory), dtype=torch.bfloat16)[0]
    loop: Any = attach(model, "never", None, cache_maker(model, None, None))
    for tokens in (NEW, context - NEW):  # the first loads kernels, which takes some MB more for a while
        prompt = torch.randint(3, model.config.vocab_size, (1, tokens))
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, eos_token_id=None)
    (session,) = loop.loop.sessions
    assert session.used >= context - 1
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "held": {"tensors": sum(each.nbytes for each in tensors), "cache": session.inputs.cache.bytes},
        "peak": in_status("VmHWM") - in_status("RssFile") + resident_bytes(directory / "model.safetensors"),
    }


def in_status(name: str) -> int:
    """Bytes that Linux says of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, name
    return 1024 * int(found[1])


if __name__ == "__main__":
    typer.run(main)
