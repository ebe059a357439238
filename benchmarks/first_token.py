"""Seconds before the first token of a model of many rates on the processor: first start, and with its kernels on disk.

    python benchmarks/first_token.py

The model is a chain of one small linear for each of 27 quantizers, every fourth of the palette: what counts is what is
compiled and loaded, not the products. Each start is a process of its own; it reads a prompt of 32 tokens (weights are
decoded whole) and makes two tokens (products of one vector).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import typer
from report import processor, report

FEATURES, PROMPT, EVERY = 256, 32, 4


def start() -> dict[str, float]:
    """One start, in this process: seconds of each part, the import of torch (by `report`) apart."""
    marks = [("", time.perf_counter())]
    from qpalette.codes import full_palette
    from qpalette.rotate import pack_signs, random_signs, rotation_for
    from qpalette.runtime import PackedLinear, backends, packed_linear

    backend = backends()["cpu"]
    marks.append(("import", time.perf_counter()))
    side = FEATURES // 16
    chain = []
    for quantizer in full_palette()[::EVERY]:
        codes = torch.randint(-(2**31), 2**31 - 1, (side, side, quantizer.words_per_tile), dtype=torch.int32)
        chain.append(
            PackedLinear(
                codes=backend.to_layout(codes, quantizer.name),
                scales=torch.full((FEATURES,), FEATURES**-0.5).half().view(torch.int16),
                diagonal=pack_signs(random_signs(FEATURES, 0, quantizer.name)),
                spec=quantizer.name,
                rotation=rotation_for(FEATURES, "full").name,
                out_features=FEATURES,
                in_features=FEATURES,
                layout=backend.layout,
            )
        )
    marks.append(("random model", time.perf_counter()))
    for name, tokens in (("prompt", PROMPT), ("first token", 1), ("second token", 1)):
        x = torch.randn(tokens, FEATURES)
        for packed in chain:
            x = packed_linear(x, packed)
        marks.append((name, time.perf_counter()))
    return {name: at - before for (name, at), (_, before) in zip(marks[1:], marks, strict=False)}


def main(one_start: bool = False) -> None:
    if one_start:
        print(json.dumps(start()))
        return
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "second"):
            began = time.perf_counter()
            command = [sys.executable, __file__, "--one-start"]
            environment = {**os.environ, "QPALETTE_COMPILE_CACHE": cache}
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            rows.append({"start": name, "whole process": time.perf_counter() - began, **json.loads(printed)})
    report("first_token_cpu", processor(), rows, features=FEATURES, prompt=PROMPT, every=EVERY)


if __name__ == "__main__":
    typer.run(main)
