"""Ours at several sizes beside GPTQ, bitsandbytes and llama.cpp's files of the same model, by `qpalette compare`.

    python benchmarks/peers.py MODEL --text TEST [--bits 2.5 --bits 3 --bits 4] [--calibration TRAIN]
                               [--other FILE.gguf ...] [--device cpu] [--windows 8] [--work out/peers]

Ours are made by the one command, `qpalette quantize MODEL OUT --bits B`, on text of the model's own or on that of
`--calibration`; what is there already is not made again. nf4 and int8 are written by transformers and bitsandbytes,
GPTQ of 4 and 3 bits by GPTQModel on the text of `--calibration`, each where its package is installed; `--other` are
models that exist, such as llama-quantize's. Writes what `compare --json` prints to benchmarks/results/NAME.json, of
which benchmarks/figures.py makes a section, and a picture to the folder of `--work`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import RESULTS
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

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
    if find_spec("bitsandbytes") is not None:
        models += [by_bitsandbytes(plain, work / kind, kind, device) for kind in ("nf4", "int8")]
    if find_spec("gptqmodel") is not None and calibration is not None:
        models += [by_gptq(plain, work / f"gptq-{each}", each, calibration) for each in GPTQ_BITS]
    measured = ["--text", text, "--windows", windows, "--device", device, "--no-speed"]
    drawn = ["--plot", work / f"{name}.png", "--json"]
    printed = qpalette("compare", model, *models, *(other or ()), *measured, *drawn)
    result = json.loads(printed)
    result["text"] = Path(result["text"]).name  # no folder of this machine
    for row in result["models"]:
        row["model"] = Path(row["model"]).name
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


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


def qpalette(*arguments: object) -> str:
    """Its standard output, which is shown, too; progress goes where ours does."""
    command = [sys.executable, "-m", "qpalette.cli", *map(str, arguments)]
    print("$ qpalette", *command[3:], flush=True)
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed, flush=True)
    return printed


if __name__ == "__main__":
    typer.run(main)
