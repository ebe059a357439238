"""LoRA by peft on a packed model and on the same weights unpacked: the loss of each step, one beside the other.

Usage: python benchmarks/lora.py ARTIFACT --text FILE [--steps 20] [--device cpu]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from report import device_name, report

from qpalette.evaluate import load_model, token_windows

WINDOW, BATCH = 64, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def losses(model: Any, windows: list[torch.Tensor], steps: int) -> list[float]:
    """Nats per token of each step; the adapters begin with the same random numbers every time."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for step in range(steps):
        ids = torch.stack(windows[BATCH * step : BATCH * (step + 1)]).to(model.device)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def main(
    artifact: str,
    text: Annotated[Path, typer.Option()],
    steps: int = 20,
    device: str = "cpu",
) -> None:
    model, tokenizer = load_model(artifact, device)
    windows = list(token_windows(text, tokenizer, WINDOW, BATCH * steps))
    packed = losses(model, windows, steps)
    plain = losses(load_model(artifact, device)[0].dequantize(), windows, steps)
    rows = [{"step": step, "packed": a, "unpacked": b} for step, (a, b) in enumerate(zip(packed, plain, strict=True))]
    report("lora", device_name(device), rows, artifact=Path(artifact).name)


if __name__ == "__main__":
    typer.run(main)
