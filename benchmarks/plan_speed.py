"""How long planning takes: 32 layers with fusion and 40 specs, and a mixture of experts.

python benchmarks/plan_speed.py

Sensitivities are log-normal, latencies a setup and a time in proportion to the bits: what they are hardly matters here.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
from report import processor, report

from qpalette.core.records import LinearShape
from qpalette.plan import (
    EXPERTS,
    LatencyProfile,
    Launch,
    Limits,
    Planner,
    SensitiveLinear,
    Sensitivities,
    Space,
    palette_of,
)

SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
SHAPES |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
SETUP_SECONDS, SECONDS_PER_BYTE = 4e-6, 1 / 0.8e12
SPECS = [candidate for candidate in palette_of(families=["tcq"]) if candidate.rate < 6]


def main() -> None:
    dense = layers(32, {})
    moe = layers(80, {f"experts.{e}.{kind}": (1536, 4096) for e in range(128) for kind in ("gate", "up")})
    rows = []
    for fusion, per_second in itertools.product(("none", "same", "free"), (120, 160)):
        space = Space(tuple(SPECS), profile(), 1, fusion)
        rows.append(row(f"32 layers, {fusion}, {per_second} tokens/s", dense, space, Limits(seconds=1 / per_second)))
    both = Space(tuple(SPECS), profile(), 1, "free")
    weights = sum(linear.shape.weights for linear in dense.linears)
    rows.append(row("32 layers, free, 140 tokens/s and 3.2 bits", dense, both, Limits(int(3.2 * weights), 1 / 140)))
    weights = sum(linear.shape.weights for linear in moe.linears)
    for experts in EXPERTS:
        space = Space(palette_of(), experts=experts)
        name = f"80 layers of 128 experts, {experts}, 3 bits"
        rows.append(row(name, moe, space, Limits(bits=3 * weights)))
    report("plan_speed", processor(), rows)


def row(name: str, sensitivities: Sensitivities, space: Space, limits: Limits) -> dict[str, Any]:
    start = time.perf_counter()
    planned = Planner(sensitivities, space).plan(limits)
    return {
        "problem": name,
        "linears": len(sensitivities.linears),
        "specs": len(space.palette),
        "seconds": round(time.perf_counter() - start, 2),
        "gap": planned.optimality_gap,
        "over uniform": planned.loss_over_uniform,
    }


def layers(count: int, experts: dict[str, tuple[int, int]]) -> Sensitivities:
    random = np.random.default_rng(0)
    linears = []
    shapes = SHAPES if not experts else {name: shape for name, shape in SHAPES.items() if name in "qkvo"} | experts
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    for layer, (name, (out, inputs)) in itertools.product(range(count), shapes.items()):
        value = float(random.lognormal(0, 1.5) * out * inputs / 1e9)
        group = f"layers.{layer}.{group_of.get(name, name)}"
        linears.append(SensitiveLinear(LinearShape(f"layers.{layer}.{name}", out, inputs), group, value))
    return Sensitivities(tuple(linears))


def profile() -> LatencyProfile:
    launches = []
    for names in GROUPS.values():
        for size in range(1, len(names) + 1):
            for members, candidate in itertools.product(itertools.combinations(names, size), SPECS):
                shapes = [SHAPES[member] for member in members]
                nbytes = float(candidate.rate) / 8 * sum(out * inputs for out, inputs in shapes)
                seconds = SETUP_SECONDS + SECONDS_PER_BYTE * nbytes
                launches.append(Launch(tuple((candidate.spec, *shape) for shape in shapes), 1, seconds))
    return LatencyProfile("model of a device", 1e-3, tuple(launches))


if __name__ == "__main__":
    main()
