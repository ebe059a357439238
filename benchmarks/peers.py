"""Ours at several sizes beside GPTQ, bitsandbytes and llama.cpp's files of the same model, by `qpalette compare`.

    python benchmarks/peers.py MODEL --text TEST [--bits 2.5 --bits 3 --bits 4] [--calibration TRAIN]
                               [--other FILE.gguf ...] [--device cpu] [--windows 8] [--work out/peers]

Ours are made by the one command, `qpalette quantize MODEL OUT --bits B`, on text of the model's own or on that of
`--calibration`; what is there already is not made again. nf4 and int8 are written by transformers and bitsandbytes,
GPTQ of 4 and 3 bits by GPTQModel on the text of `--calibration`, each where its package is installed; `--other` are
models that exist, such as llama-quantize's. Writes what `compare --json` prints to benchmarks/results/NAME.json, after
each model, of which benchmarks/figures.py makes a section, and a picture to the folder of `--work`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import RESULTS, device_name
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qpalette.evaluate.compare import Compared, compare, reason
from qpalette.report.compare_plot import draw_comparison
from qpalette.storage import open_checkpoint
from qpalette.storage.export import export_checkpoint

BITS = ["2.5", "3", "4"]
GPTQ_BITS, GROUP, SAMPLES, LENGTH = (4, 3), 128, 128, 1024


def main(
    model: str,
    text: Annotated[Path, typer.Option(help="What KL is measured on.")],
    bits: Annotated[list[str] | None, typer.Option(help="Of ours.")] = None,
    other: Annotated[list[str] | None, typer.Option(help="A model to compare as well.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="What ours and GPTQ are calibrated on.")] = None,
    device: str = "cpu",
    windows: int = 8,
    work: Path = Path("out/peers"),
    name: str = "compare_peers",
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    given = [] if calibration is None else ["--text", calibration]
    models = [ours(model, each, work, device, given) for each in bits or BITS]
    plain = work / "plain"
    if not plain.exists():
        export_checkpoint(open_checkpoint(model), plain)
    makers: list[partial[Path]] = []
    if find_spec("bitsandbytes") is not None:
        makers += [partial(by_bitsandbytes, plain, work / kind, kind, device) for kind in ("nf4", "int8")]
    if find_spec("gptqmodel") is not None and calibration is not None:
        makers += [partial(by_gptq, plain, work / f"gptq-{each}", each, calibration) for each in GPTQ_BITS]
    for make in makers:
        try:
            models.append(make())
        except Exception as error:  # whatever a peer's code raises: the others are measured
            print(f"{make.args[1].name}: {reason(error)}", flush=True)
    facts = {"text": text.name, "windows": windows, "device": device_name(device), "date": str(date.today())}

    def found(rows: Sequence[Compared]) -> None:
        named = [asdict(row) | {"model": Path(row.model).name} for row in rows]  # no folder of this machine
        (RESULTS / f"{name}.json").write_text(json.dumps(facts | {"models": named}, indent=1) + "\n")
        print(named[-1], flush=True)

    draw_comparison(compare(model, [*models, *(other or ())], text, windows, device, found=found), work / f"{name}.png")


def ours(model: str, bits: str, work: Path, device: str, given: list[Any]) -> Path:
    out = work / f"{Path(model).name.partition('.')[0]}-{bits}bit"
    if not out.exists():
        qpalette("quantize", model, out, "--bits", bits, "--device", device, *given)
    return out


def by_bitsandbytes(source: Path, out: Path, kind: str, device: str) -> Path:
    if out.exists():
        return out
    said: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.float16}
    config = BitsAndBytesConfig(**said if kind == "nf4" else {"load_in_8bit": True})
    placed = {"quantization_config": config, "device_map": device}
    AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **placed).save_pretrained(out)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(out)
    return out


def by_gptq(source: Path, out: Path, bits: int, calibration: Path) -> Path:
    if out.exists():
        return out
    from gptqmodel import GPTQModel, QuantizeConfig

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    ids = tokenizer(calibration.read_text())["input_ids"]
    samples = [ids[start : start + LENGTH] for start in range(0, min(len(ids), SAMPLES * LENGTH), LENGTH)]
    peer = GPTQModel.load(str(source), QuantizeConfig(bits=bits, group_size=GROUP))
    peer.quantize([{"input_ids": each, "attention_mask": [1] * len(each)} for each in samples])
    peer.save(str(out))
    return out


def qpalette(*arguments: object) -> None:
    command = [sys.executable, "-m", "qpalette.cli", *map(str, arguments)]
    print("$ qpalette", *command[3:], flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    typer.run(main)
