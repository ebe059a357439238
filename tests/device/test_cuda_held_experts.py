"""A module's experts in a step that is compiled and captured: the graph knows them by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qpalette.backends.cuda.graphs import capture_graph

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from experts import random_layer

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXPERTS, HIDDEN, INNER = 8, 256, 128


@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_compiled_and_captured_as_eager(tokens: int, dtype: torch.dtype) -> None:
    layer = random_layer(EXPERTS, HIDDEN, INNER, "tcq2-3").cuda()
    own = torch.Generator(device="cuda").manual_seed(tokens)

    def routed() -> list[torch.Tensor]:
        x = torch.randn(tokens, HIDDEN, generator=own, device="cuda").to(dtype)
        index = torch.randint(EXPERTS, (tokens, 2), generator=own, device="cuda")
        return [x, index, torch.rand(tokens, 2, generator=own, device="cuda").to(dtype)]

    operands, found = routed(), torch.empty(tokens, HIDDEN, dtype=dtype, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)

    def step() -> None:
        found.copy_(compiled(*operands))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = capture_graph(step)
    for operand, other in zip(operands, routed(), strict=True):  # other experts than those that were captured
        operand.copy_(other)
    graph.replay()
    assert torch.equal(found, layer(*operands))


def test_a_graph_has_no_operand_for_each_expert() -> None:
    """On the torch of this machine, which may be another than that of the tests without a GPU."""
    layer, counts = random_layer(EXPERTS, HIDDEN, INNER, "tcq2-3").cuda().requires_grad_(False), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(len(inputs))
        return graph

    x, index = torch.randn(3, HIDDEN, device="cuda"), torch.zeros(3, 2, dtype=torch.int64, device="cuda")
    torch.compiler.reset()
    torch.compile(layer, fullgraph=True, backend=backend)(x, index, torch.rand(3, 2, device="cuda"))
    assert counts == [4]  # what came in, and one expert's codes
