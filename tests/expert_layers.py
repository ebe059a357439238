"""Layers of experts with random codes, and what they compute by definition, for tests of backends."""

from __future__ import annotations

import dataclasses

import torch

from qpalette.rotate import Rotation, diagonal_of, unrotate_weight
from qpalette.runtime import Gate, PackedExperts, PackedLinear
from random_packed import REF, laid_out, random_linear

HIDDEN, INNER = 96, 40
SPECS = ("nuq-4", "tcq-2-L12", "nuq-3", "tcq-3-L12")  # experts of different rates and ways of decoding
GPT_OSS = Gate("silu", interleaved=True, limit=7.0, alpha=1.702, offset=1.0)
GATES = [Gate("silu"), Gate("gelu"), Gate("gelu_tanh"), Gate("silu", limit=9.0), GPT_OSS, Gate("relu2", gated=False)]


def matrix(rows: int, columns: int, seed: int, signs_of: int | None = None, spec: str | None = None) -> PackedLinear:
    """As `random_linear`, with codes, scales and signs of its own; `signs_of`: those of that seed."""
    packed = random_linear(spec or SPECS[seed % len(SPECS)], rows, columns)
    own, signs = (torch.Generator().manual_seed(1000 + each) for each in (seed, seed if signs_of is None else signs_of))
    return packed.with_(
        codes=torch.randint(-(2**31), 2**31 - 1, packed.codes.shape, generator=own, dtype=torch.int32),
        scales=(torch.rand(rows, generator=own) + 0.5).half().view(torch.int16),
        diagonal=torch.randint(0, 255, packed.diagonal.shape, generator=signs, dtype=torch.uint8),
    )


def layer(gate: Gate = GATES[0], experts: int = 5, biased: bool = False, one_basis: bool = True) -> PackedExperts:
    """Stored. `one_basis`: what the experts compute first has the same signs."""
    first_rows = [INNER, INNER] if gate.gated and not gate.interleaved else [2 * INNER if gate.gated else INNER]
    first = [
        [
            matrix(rows, HIDDEN, 10 * expert + part, signs_of=0 if one_basis else None)
            for part, rows in enumerate(first_rows)
        ]
        for expert in range(experts)
    ]
    last = [matrix(HIDDEN, INNER, 10 * expert + 9) for expert in range(experts)]
    own = torch.Generator().manual_seed(2)
    biases = [torch.randn(experts, size, generator=own) if biased else None for size in (sum(first_rows), HIDDEN)]
    return PackedExperts(first, last, gate, *biases)


def on(backend: str, experts: PackedExperts) -> PackedExperts:
    first = [[laid_out(backend, each) for each in matrices] for matrices in experts.first]
    return dataclasses.replace(experts, first=first, last=[laid_out(backend, each) for each in experts.last])


def routed(tokens: int, experts: int = 5, ranks: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, index and weights: with duplicates, and with both values that stand for no expert."""
    own = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, experts + 1, (tokens, ranks), generator=own)
    return torch.randn(tokens, HIDDEN, generator=own), index, torch.rand(tokens, ranks, generator=own)


def dense(packed: PackedLinear) -> torch.Tensor:
    columns = packed.in_features
    rotation, diagonal = Rotation.parse(packed.rotation, columns), diagonal_of(packed.diagonal, columns)
    return unrotate_weight(REF.rotated_weight(packed), rotation, diagonal).double()


def definition(experts: PackedExperts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Slot by slot, in float64."""
    y = torch.zeros_like(x, dtype=torch.float64)
    weight = {
        expert: (torch.cat(list(map(dense, experts.first[expert]))), dense(experts.last[expert]))
        for expert in range(len(experts.last))
        if bool((index == expert).any())
    }
    for token, slots in enumerate(index.tolist()):
        for rank, expert in enumerate(slots):
            if expert in weight:
                inner = weight[expert][0] @ x[token].double()
                inner = inner if experts.first_bias is None else inner + experts.first_bias[expert]
                output = weight[expert][1] @ experts.gate(inner)
                output = output if experts.last_bias is None else output + experts.last_bias[expert]
                y[token] += weights[token, rank].double() * output
    return y
