"""The experts of a layer on a GPU against their definition in float64.

Tolerance: of a product it is that of `test_cuda_products`; there are two behind one another, and a gate that multiplies
two results of the first has the errors of both.
"""

import dataclasses

import pytest
import torch
from test_cuda_products import TOLERANCE

from expert_layers import GATES, GPT_OSS, HIDDEN, INNER, definition, layer, matrix, on, routed
from qpalette.backends.cuda.experts import STATE_ROWS, CudaExperts, plan_threads, takes
from qpalette.runtime import Gate, PackedExperts, PackedLinear, PreparedExperts, backends, packed_experts

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(experts: PackedExperts) -> PackedExperts:
    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.cuda()

    def there(each: PackedLinear) -> PackedLinear:
        return each.with_(codes=each.codes.cuda(), scales=each.scales.cuda(), diagonal=each.diagonal.cuda())

    return on(
        "cuda",
        dataclasses.replace(
            experts,
            first=[[there(each) for each in matrices] for matrices in experts.first],
            last=[there(each) for each in experts.last],
            first_bias=moved(experts.first_bias),
            last_bias=moved(experts.last_bias),
        ),
    )


def of_sizes(hidden: int, inner: int, experts: int, gate: Gate = GATES[0]) -> PackedExperts:
    parts = [inner, inner] if gate.gated and not gate.interleaved else [2 * inner if gate.gated else inner]
    first = [[matrix(rows, hidden, 10 * e + part, 0) for part, rows in enumerate(parts)] for e in range(experts)]
    return PackedExperts(first, [matrix(hidden, inner, 10 * e + 9) for e in range(experts)], gate)


def check(
    experts: PackedExperts,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    packed, x = on_cuda(experts), x.to(dtype)
    assert takes(packed)
    found = packed_experts(x.cuda(), index.cuda(), weights.cuda(), packed)
    wanted = definition(experts, x, index, weights)
    assert found.dtype == dtype
    bound = 3 * TOLERANCE[torch.float16] + TOLERANCE.get(dtype, 0)
    assert float((found.cpu().double() - wanted).norm()) <= bound * float(wanted.norm())


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_every_gate(gate: Gate) -> None:
    check(layer(gate), *routed(7))


@pytest.mark.parametrize("tokens", [1, 2, 17, 70, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    check(layer(), *routed(tokens, seed=tokens), dtype)


@pytest.mark.parametrize(("hidden", "inner"), [(2880, 2880), (2048, 1408), (512, 704), (1024, 1856), (250, 96)])
def test_odd_sizes(hidden: int, inner: int) -> None:
    own = torch.Generator().manual_seed(hidden)
    index = torch.randint(0, 3, (5, 2), generator=own)
    check(of_sizes(hidden, inner, 3), torch.randn(5, hidden, generator=own), index, torch.rand(5, 2, generator=own))


def test_biases() -> None:
    check(layer(GPT_OSS, biased=True), *routed(5))


def test_one_expert_takes_all_and_others_none() -> None:
    x, index, weights = routed(40)
    check(layer(), x, torch.full_like(index, 3), weights)


def test_a_class_with_a_gate_of_its_own() -> None:
    own = dataclasses.replace(layer(biased=True), gate=lambda x: torch.tanh(x[..., :INNER]) + x[..., INNER:])
    check(own, *routed(6))


def test_more_slots_than_a_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpalette.backends.cuda.experts.ROOM_BYTES", 1 << 20)
    most = CudaExperts(on_cuda(layer())).most_slots
    assert 1 < most < 1000
    check(layer(), *routed(most // 3 + 100))


def test_more_slots_than_the_plan_has_threads_and_more_pieces_than_a_block_finds_at_once() -> None:
    check(layer(), *routed(6000))


def test_pieces_of_more_row_tiles_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpalette.backends.cuda.experts.most_rows", lambda *_: STATE_ROWS + 1)
    check(layer(), *routed(300))


@pytest.mark.parametrize("experts", [33, 300])
def test_many_experts(experts: int) -> None:
    assert (plan_threads(experts) > plan_threads(1)) == (experts > 256)
    check(layer(experts=experts), *routed(12, experts=experts))


MANY = ("nuq-3", "nuq-4", "tcq-2.125", "tcq-3.25", "tcq2-2", "tcq2-3.25", "vq-1.5", "vq-2")


@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_every_expert_has_a_code_of_its_own(tokens: int) -> None:
    parts = [[matrix(96, 256, 10 * e + part, 0, spec) for part in range(2)] for e, spec in enumerate(MANY)]
    experts = PackedExperts(parts, [matrix(256, 96, 10 * e + 9, spec=spec) for e, spec in enumerate(MANY)], GATES[0])
    own = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, len(MANY), generator=own).topk(3).indices
    check(experts, torch.randn(tokens, 256, generator=own), index, torch.rand(tokens, 3, generator=own))


def test_no_token_and_no_expert() -> None:
    experts = on_cuda(layer())
    x, index, weights = (each.cuda() for each in routed(4))
    assert packed_experts(x[:0], index[:0], weights[:0], experts).shape == (0, HIDDEN)
    nowhere = torch.tensor([[-1, 5, 10**9]], device="cuda").expand(4, 3)
    unused = torch.full_like(weights, torch.nan)
    assert torch.equal(packed_experts(x, nowhere, unused, experts), torch.zeros_like(x))


def test_bases_of_their_own_are_served_one_by_one() -> None:
    experts, (x, index, weights) = layer(one_basis=False), routed(5)
    packed = on_cuda(experts)
    assert not takes(packed)
    found = packed_experts(x.cuda(), index.cuda(), weights.cuda(), packed).cpu().double()
    wanted = definition(experts, x, index, weights)
    assert float((found - wanted).norm()) <= 4 * TOLERANCE[torch.float16] * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_bits_alone_and_among_63_others(dtype: torch.dtype) -> None:
    run = PreparedExperts(on_cuda(layer(biased=True)))
    x, index, weights = (each.cuda() for each in routed(64))
    x = x.to(dtype)
    together = run(x, index, weights)
    assert torch.equal(run(x, index, weights), together)
    for token in range(64):
        each = slice(token, token + 1)
        assert torch.equal(run(x[each], index[each], weights[each]), together[each])


def test_a_token_that_is_not_finite_stays_so_and_harms_no_other() -> None:
    run = PreparedExperts(on_cuda(layer()))
    x, index, weights = (each.cuda() for each in routed(9))
    index = index.clamp(0, 4)
    good = run(x, index, weights)
    x[3, 5] = torch.nan
    bad = run(x, index, weights)
    assert bad[3].isnan().all()
    others = [token for token in range(9) if token != 3]
    assert torch.equal(bad[others], good[others])


def test_nobody_waits_and_a_graph_holds_it() -> None:
    run = PreparedExperts(on_cuda(layer(biased=True)))
    x, index, weights = (each.cuda() for each in routed(12))
    run(x, index, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, index, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, index, weights)
    for seed in (1, 2):
        fresh = [each.cuda() for each in routed(12, seed=seed)]
        for old, new in zip((x, index, weights), fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(y, run(*fresh))


def test_compiled_whole() -> None:
    experts = on_cuda(layer(biased=True))
    x, index, weights = (each.cuda() for each in routed(6))
    compiled = torch.compile(
        lambda x, index, weights: packed_experts(x, index, weights, experts), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, index, weights), packed_experts(x, index, weights, experts))


def test_what_is_prepared_is_kept_for_as_long_as_the_codes_live() -> None:
    experts = on_cuda(layer())
    first = backends()["cuda"].experts(experts)
    assert isinstance(first, CudaExperts)
    assert backends()["cuda"].experts(experts) is first
    assert backends()["cuda"].experts(dataclasses.replace(experts, gate=GATES[1])) is not first
