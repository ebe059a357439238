"""How true is 'any model'? Every class that transformers maps to text generation, tiny and random, end to end.

    python benchmarks/architectures.py [--out FILE] [--only qwen3_next --only image:qwen3_5] [--resume] [--table]

One line of JSON per class is appended to FILE (.jsonl) as soon as it is known; with --resume those that are there
already are skipped; with --table nothing is run, and the table is written. What is checked: architecture_checks.py.
Every class runs in a forked process of its own, 300 s and 12 GB of addresses at most. share_language is the part of the
language model's weights that multiply which is packed.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # before they are read, and of no process that takes a class from here
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")  # the others refuse to be forked
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
import typer
from architecture_checks import check_class
from report import RESULTS, processor
from tiny_models import VARIANTS
from transformers.models.auto import modeling_auto

TIMEOUT = 300
ADDRESSES = 12 << 30
MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
CHECKS = (
    *("said", "no_tensor_lost", "equals_export", "equals_dequantize"),
    *("near_original", "generates", "saves", "bf16"),
)
# One of each kind of trouble that a class can make: these run with the tests.
SUBSET = (
    *("causal:llama", "causal:llama+tied", "causal:qwen3", "causal:phi3", "causal:gemma2", "causal:gemma3n_text"),
    *("causal:gemma4_text", "causal:gpt2", "causal:openai-gpt", "causal:gpt_bigcode", "causal:bloom", "causal:falcon"),
    *("causal:opt+projected", "causal:mixtral", "causal:qwen3_moe", "causal:deepseek_v3", "causal:granitemoe"),
    *("causal:gpt_oss", "causal:llama4_text", "causal:longcat_flash", "causal:jetmoe", "causal:aria_text"),
    *("causal:minimax_m2", "causal:nemotron_h", "causal:mamba", "causal:mamba2", "causal:rwkv", "causal:zamba"),
    *("causal:zamba2", "causal:qwen3_next", "causal:hrm_text", "causal:nanochat", "causal:modernbert-decoder"),
    *("image:llava", "image:gemma3", "image:qwen3_vl_moe", "image:inkling_mm_model", "image:mistral_large4"),
    *("seq2seq:t5", "seq2seq:bart"),
)


def classes() -> list[tuple[str, str]]:
    """(kind, model type) of all."""
    mapped = [(kind, name) for kind, table in MAPPINGS.items() for name in sorted(getattr(modeling_auto, table))]
    return mapped + [("causal", name) for name in VARIANTS]


def passes(row: dict[str, Any]) -> bool:
    return not row["failures"] and all(row["checks"].values())


def in_child(kind: str, model_type: str, where: Path) -> dict[str, Any]:
    """Forked: libraries are imported and kernels compiled once."""
    result = where / f"{os.getpid()}.{kind}.{model_type}.json"
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
            with tempfile.TemporaryDirectory(dir=where) as folder:
                result.write_text(json.dumps(check_class(kind, model_type, Path(folder)), default=str))
        finally:
            os._exit(0)
    deadline = time.monotonic() + TIMEOUT
    while not os.waitpid(pid, os.WNOHANG)[0]:
        time.sleep(0.05)
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
    if result.exists():
        row = json.loads(result.read_text())
        result.unlink()
        return row
    return {"kind": kind, "type": model_type, "checks": {}, "failures": {"process": "no result"}}


def rows_of(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last row of each class."""
    lines = out.read_text().splitlines() if out.exists() else []
    return {(row["kind"], row["type"]): row for row in map(json.loads, lines)}


def table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Markdown: the sums, then every class."""
    every = list(rows.values())
    built = [row for row in every if "build" not in row["failures"]]
    packed = sum((row.get("share_language") or 0) >= 0.97 for row in every)
    unloadable = sum("load" in row["failures"] for row in every)
    lines = [
        f"{len(every)} classes of transformers {transformers.__version__}, {len(built)} of which it builds from a "
        f"small config; {sum(map(passes, every))} pass every check; {packed} have 97 % or more of the language model "
        f"packed; {unloadable} were quantized and cannot be loaded; {sum('quantize' in r['failures'] for r in every)} "
        f"were refused. {processor()}.",
        "",
        f"| kind | type | class | language | linears | {' | '.join(CHECKS)} | corr | failures |",
        "|---" * (len(CHECKS) + 7) + "|",
    ]
    for (kind, model_type), row in sorted(rows.items()):
        shares = (row.get("share_language"), row.get("share_linear"))
        spelled = ("" if share is None else f"{100 * share:.1f}" for share in shares)
        marks = ({True: "ok", False: "**no**", None: ""}[row["checks"].get(name)] for name in CHECKS)
        why = "; ".join(f"{stage}: {error[:110]}" for stage, error in row["failures"].items())
        cells = (kind, model_type, row.get("class", ""), *spelled, *marks, row.get("correlation", ""), why)
        lines.append(f"| {' | '.join(str(cell).replace('|', '/').replace(chr(10), ' ') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(
    out: Path = RESULTS / "architectures.jsonl",
    only: Annotated[list[str] | None, typer.Option()] = None,
    kind: str | None = None,
    resume: bool = False,
    table_only: Annotated[bool, typer.Option("--table")] = False,
) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    done = rows_of(out) if resume else {}
    with tempfile.TemporaryDirectory() as folder:
        if not table_only:
            check_class("causal", "llama", Path(folder) / "warm-up")  # compiles the kernels, for all children
        for class_kind, model_type in [] if table_only else classes():
            wanted = not only or model_type in only or f"{class_kind}:{model_type}" in only
            if not wanted or (kind and class_kind != kind) or (class_kind, model_type) in done:
                continue
            row = in_child(class_kind, model_type, Path(folder))
            with open(out, "a") as stream:
                stream.write(json.dumps(row) + "\n")
            bad = [check for check, good in row["checks"].items() if not good]
            print(f"{class_kind}:{model_type:28}", row.get("share_language"), bad, row["failures"], flush=True)
    (out.with_suffix(".md")).write_text(table(rows_of(out)))


if __name__ == "__main__":
    typer.run(main)
