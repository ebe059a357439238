"""Products of 17 to 512 tokens on a GPU against the reference, within the bounds of test_cuda_products.py; and that a
token's bits depend neither on how the work is cut nor on the tokens beside it."""

from __future__ import annotations

import pytest
import torch
from test_cuda_products import check, members

from qpalette.backends.cuda import multiply, teams
from qpalette.backends.cuda.product import CudaProduct
from qpalette.backends.cuda.segments import DeviceLimits, Grid, Planner, plan_grid
from qpalette.runtime import PackedLinear, backends
from qpalette.runtime.prefill import FEW_TOKENS

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPECS = ("tcq-3.25", "tcq-8", "tcq2-1", "tcq2-3.25", "tcq2-3.125-L18", "tcq2-5", "vq-1.5", "vq-6", "nuq-3", "nuq-8")
SHAPES = (
    (48, 576, 17),
    (1000, 5376, 33),
    (2064, 4096, 64),
    (333, 250, 48),
    (4096, 1024, 128),
    (16, 18944, 70),
    (5000, 8192, 300),
)
EXACT = ("tcq2-3.25", "nuq-4", "tcq-2.125")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_reference(spec: str, shape: tuple[int, int, int]) -> None:
    rows, columns, tokens = shape
    check([spec], [rows], columns, tokens, torch.bfloat16 if rows % 3 else torch.float16)


@pytest.mark.parametrize("tokens", [*range(17, FEW_TOKENS, 16), FEW_TOKENS, 129, 200, 257, 320, 500, teams.MOST_TOKENS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_number_of_tokens_and_type(tokens: int, dtype: torch.dtype) -> None:
    check(list(EXACT), [1000, 333, 4096], 2880, tokens, dtype)


def test_more_segments_than_a_launch_takes() -> None:
    check(["tcq2-3.25"] * 10, [256] * 10, 1024, 40, torch.bfloat16)


def product(found: list[PackedLinear], x: torch.Tensor) -> torch.Tensor:
    return CudaProduct(found).joined(x)


@pytest.mark.parametrize("rows", [(16, 4096, 1000), (48, 64, 33)], ids=str)
@pytest.mark.parametrize("columns", [250, 2880, 4096])
@pytest.mark.parametrize("tokens", [20, 40, 64, 90, 128])
def test_the_same_bits_in_any_cut(
    rows: tuple[int, ...], columns: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = members(list(EXACT), list(rows), columns)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
    wanted = product(found, x)
    for blocks in (1, 7, 500):

        def cut(limits: DeviceLimits, most_rows: int, lots: int, blocks: int = blocks) -> Planner:
            return lambda kernel, row_tiles, costs: plan_grid(row_tiles, costs, blocks, most_rows)

        def cut_in_teams(items: tuple[int, ...], costs: tuple[float, ...], *_: int, blocks: int = blocks) -> Grid:
            return plan_grid(items, costs, blocks, max(items))

        monkeypatch.setattr(multiply, "block_by_block", cut)
        monkeypatch.setattr(teams, "plan_grid", cut_in_teams)
        assert torch.equal(product(found, x), wanted), f"as for {blocks} multiprocessors"


def test_a_token_is_the_same_bits_in_any_company() -> None:
    found = members(list(EXACT), [1000, 48, 256], 4096)
    x = torch.randn(FEW_TOKENS, 4096, device="cuda", dtype=torch.float16)
    wanted = backends()["cuda"].linears(x, found)
    for tokens in (33, 64, 65, 97):  # as far as one kernel serves on every device
        assert torch.equal(backends()["cuda"].linears(x[:tokens], found), wanted[:tokens])
        assert torch.equal(backends()["cuda"].linears(x[-tokens:], found), wanted[-tokens:])


@pytest.mark.parametrize("tokens", [17, 64, 100, 260])
def test_a_captured_product_replays_with_what_is_there_then(tokens: int) -> None:
    found = members(list(EXACT), [1000, 48, 256], 4096)
    prepared, x = CudaProduct(found), torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
    prepared(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [prepared(x) for _ in range(3)]
    x.copy_(torch.randn_like(x))
    graph.replay()
    for results in captured:
        for y, wanted in zip(results, prepared(x), strict=True):
            assert torch.equal(y, wanted)
