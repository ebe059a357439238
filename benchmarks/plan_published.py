"""The planner on the published data of Q-Palette for Llama-3.1-8B: sensitivities, palette, RTX 4090 latencies.

python benchmarks/plan_published.py [--data ../shared/data]

Memory: predicted loss over the information-theoretic bound, code bits alone counted (as published) or everything.
Time: the published palette under a limit on seconds per token, one token at a time, with three kinds of fusion. A fused
launch whose segments differ costs, for each segment, the time measured when the whole launch has that segment's spec,
times the segment's share of the weights; all its segments use the same kind of cores. 1.6 ms per token come on top.
"""

from __future__ import annotations

import csv
import time
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from report import processor, report

from qpalette.core.errors import BudgetError
from qpalette.plan import Candidate, LatencyProfile, Launch, Limits, Planned, Planner, Sensitivities, Space, palette_of

BITS = ("2.25", "2.5", "3", "3.25", "3.5", "4")
PUBLISHED = (1.19, 1.20, 1.25, 1.29, 1.34, 1.46)  # loss over bound that the published palette must give, within 1 %
BARS = (1.105, 1.11, 1.12, 1.13, 1.135, 1.15)  # at most, with ours
SPEEDS = (150, 175, 200, 225)  # tokens per second
CONSTANT_SECONDS = 1.6e-3
SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
SHAPES |= {"g": (14336, 4096), "u": (14336, 4096), "d": (4096, 14336)}


def main(data: Annotated[Path, typer.Option()] = Path(__file__).parents[1] / "../shared/data") -> None:
    sensitivities = Sensitivities.read(data / "llama31_8b_sensitivity.csv")
    published, profile = published_palette(data), published_profile(data)
    report("plan_published_memory", processor(), memory_rows(sensitivities, published), model="Llama-3.1-8B")
    spaces = {fusion: Space(published, profile, 1, fusion, count_bits=code_bits) for fusion in ("none", "same", "free")}
    planners = {fusion: Planner(sensitivities, space) for fusion, space in spaces.items()}
    rows = speed_rows(planners)
    report("plan_published_speed", processor(), rows, model="Llama-3.1-8B", latency=profile.device)


def memory_rows(sensitivities: Sensitivities, published: tuple[Candidate, ...]) -> list[dict[str, Any]]:
    theirs = Planner(sensitivities, Space(published, count_bits=code_bits))
    ours = Planner(sensitivities, Space(palette_of(), count_bits=code_bits))
    counted = Planner(sensitivities, Space(palette_of()))
    rows = []
    for bits, known, bar in zip(BITS, PUBLISHED, BARS, strict=True):
        limits = Limits(bits=int(Fraction(bits) * ours.weights))
        start = time.perf_counter()
        everything = counted.plan(limits)
        seconds = time.perf_counter() - start
        figures = [planner.plan(limits).loss_over_bound for planner in (theirs, ours)]
        rows.append(
            {
                "bits": bits,
                "published palette": figures[0],
                "as published": known,
                "ours": figures[1],
                "ours, all counted": everything.loss_over_bound,
                "at most": bar,
                "over uniform": everything.loss_over_uniform,
                "gap": everything.optimality_gap,
                "solve s": round(seconds, 2),
            }
        )
    return rows


def speed_rows(planners: dict[str, Planner]) -> list[dict[str, Any]]:
    rows = []
    for speed in SPEEDS:
        found, seconds = {}, {}
        for fusion, planner in planners.items():
            start = time.perf_counter()
            found[fusion] = planner.plan(Limits(seconds=1 / speed))
            seconds[fusion] = time.perf_counter() - start
        none, same, free = (found[fusion] for fusion in ("none", "same", "free"))
        rows.append(
            {
                "tokens/s": speed,
                "loss, none": none.choice.loss,
                "same": same.choice.loss,
                "free": free.choice.loss,
                "same/none": same.choice.loss / none.choice.loss,
                "free/same": free.choice.loss / same.choice.loss,
                "tokens/s at loss of none: same": fastest(planners["same"], none, speed),
                "at loss of same: free": fastest(planners["free"], same, speed),
                "launches": "/".join(str(len(plan.choice.launches)) for plan in (none, same, free)),
                "largest gap": max(plan.optimality_gap for plan in found.values()),
                "longest solve s": round(max(seconds.values()), 2),
            }
        )
    return rows


def fastest(planner: Planner, target: Planned, slowest: float, steps: int = 12) -> float:
    """The most tokens per second at which the planner still has no more loss than `target`, by bisection to 0.1 %."""
    low, high = slowest, 2 * slowest
    for _ in range(steps):
        middle = (low + high) / 2
        try:
            within = planner.plan(Limits(seconds=1 / middle), "lagrangian").choice.loss <= target.choice.loss
        except BudgetError:
            within = False
        low, high = (middle, high) if within else (low, middle)
    return low


def code_bits(rate: Fraction, out_features: int, in_features: int) -> int:
    """Codes alone, no scales: how the published palette counts."""
    return int(rate * out_features * in_features)


def published_palette(data: Path) -> tuple[Candidate, ...]:
    with open(data / "published_distortion.csv", newline="") as file:
        return tuple(
            Candidate(_name(row), Fraction(row["bits"]), float(row["distortion"])) for row in csv.DictReader(file)
        )


def published_profile(data: Path) -> LatencyProfile:
    """Groups are spelt by their members: "qkv" is one launch of three segments."""
    launches = []
    with open(data / "llama31_8b_latency_rtx4090.csv", newline="") as file:
        for row in csv.DictReader(file):
            segments = tuple((_name(row), *SHAPES[letter]) for letter in row["group"])
            launches.append(Launch(segments, 1, float(row["seconds"]), row["cores"]))
    return LatencyProfile("NVIDIA GeForce RTX 4090", CONSTANT_SECONDS, tuple(launches), spread=0.0)


def _name(row: dict[str, str]) -> str:
    return f"{row['family']}-{float(row['bits']):g}"


if __name__ == "__main__":
    typer.run(main)
