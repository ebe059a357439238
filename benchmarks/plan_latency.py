"""Whether plans are as fast as their latency profile says: made for a speed, then timed; needs the profile's GPU.

    python benchmarks/plan_latency.py SENSITIVITIES [--profile h100-llama-3.1-8b]

The model is Llama-3.1-8B's config with random weights and a float16 head, compiled, after 1024 tokens.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

import torch
import typer
from report import device_name, report

from qpalette.bench import from_config, measure, read_config
from qpalette.pipeline.planning import make_plan
from qpalette.plan import Budget, LatencyProfile, Sensitivities, Space, palette_of

CONFIG = "llama-3.1-8b"
CONTEXT, STEPS = 1024, 64
BUDGETS = ((1, "3.25", 400), (1, "4", 300), (1, "4", 380), (8, "4", 250))  # batch, bits, tokens/s of a sequence


def main(sensitivities: str, profile: Annotated[str, typer.Option()] = "h100-llama-3.1-8b") -> None:
    known, latencies = Sensitivities.read(sensitivities), LatencyProfile.read(profile)
    shape, device = read_config(CONFIG), torch.device("cuda", 0)
    rows: list[dict[str, Any]] = []
    for batch, bits, speed in BUDGETS:
        made = make_plan(
            known, Budget(Fraction(bits), None, None, speed), Space(palette_of(), latencies, batch, "free")
        )
        name = f"{bits} bits, {speed} tokens/s"
        candidate = from_config(name, shape, made.plan, torch.float16, device, "grouped")
        (measured, _), *_ = measure([candidate], [batch], [CONTEXT], STEPS, "compile-graph")
        predicted = made.planned.choice.seconds
        assert predicted is not None, "a plan within a speed has one"
        rows.append(
            {
                "batch": batch,
                "budget": name,
                "bits": float(made.planned.average_bits),
                "asked tokens/s": speed,
                "predicted loss": made.planned.choice.loss,
                "predicted ms": predicted * 1e3,
                "measured ms": measured.decode_seconds * 1e3,
                "measured tokens/s": 1 / measured.decode_seconds,
                "measured over predicted": measured.decode_seconds / predicted,
            }
        )
        report("plan_latency", device_name("cuda"), rows, profile=profile, context=CONTEXT)


if __name__ == "__main__":
    typer.run(main)
