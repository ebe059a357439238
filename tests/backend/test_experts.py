"""The experts of a layer as one operator, on every backend, against its definition in float64."""

import dataclasses

import pytest
import torch

from expert_layers import GATES, GPT_OSS, HIDDEN, INNER, definition, layer, matrix, on, routed
from qpalette.core.errors import InputError
from qpalette.runtime import Backend, Gate, PackedExperts, PreparedExperts, backends, packed_experts
from random_packed import REF
from tolerance import check_float32


class Plain(Backend):
    """The reference without an operator for experts: what a backend gets that has none."""

    name, priority = "plain", -1
    supports, encode, decode = REF.supports, REF.encode, REF.decode
    linear, rotated_weight = REF.linear, REF.rotated_weight


@pytest.fixture(params=["ref", "cpu", "plain"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(backends(), "plain", Plain())
    monkeypatch.setattr("qpalette.runtime.ops.select", lambda *_: backends()[request.param])
    return str(request.param)


def check(name: str, experts: PackedExperts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
    found = packed_experts(x, index, weights, on(name, experts))
    # Each rotation's roundings and each sum's, twice over for a gate that multiplies two results.
    terms = 4 * (HIDDEN + INNER) + 64
    check_float32(found, lambda x: definition(experts, x, index, weights), (x,), terms)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_every_gate(name: str, gate: Gate) -> None:
    check(name, layer(gate), *routed(7))


@pytest.mark.parametrize("tokens", [1, 2, 17, 70])
def test_any_number_of_tokens(name: str, tokens: int) -> None:
    check(name, layer(), *routed(tokens, seed=tokens))


@pytest.mark.parametrize("gate", [Gate("silu"), GPT_OSS], ids=str)
def test_any_bases(name: str, gate: Gate) -> None:
    """Each matrix with signs of its own; with one first matrix an expert, those are each expert's."""
    check(name, layer(gate, one_basis=False), *routed(5))


def test_biases(name: str) -> None:
    check(name, layer(GPT_OSS, biased=True), *routed(5))


def test_one_expert_takes_all_and_others_none(name: str) -> None:
    x, index, weights = routed(40)
    check(name, layer(), x, torch.full_like(index, 3), weights)


def test_no_token_and_no_expert(name: str) -> None:
    experts = on(name, layer())
    x, index, weights = routed(4)
    assert packed_experts(x[:0], index[:0], weights[:0], experts).shape == (0, HIDDEN)
    nowhere = torch.tensor([[-1, 5, 10**9]]).expand(4, 3)
    unused = torch.full_like(weights, torch.nan)  # a slot that does not exist has no weight either
    assert torch.equal(packed_experts(x, nowhere, unused, experts), torch.zeros_like(x))


def test_a_token_is_the_same_bits_alone_and_among_63_others(name: str) -> None:
    if name == "plain":
        pytest.skip("a product by torch is not the same bits for one row and for several")
    for dtype in (torch.float32, torch.bfloat16):
        run = PreparedExperts(on(name, layer(biased=True)))
        x, index, weights = routed(64)
        together = run(x.to(dtype), index, weights)
        for token in range(64):
            each = slice(token, token + 1)
            assert torch.equal(run(x[each].to(dtype), index[each], weights[each]), together[each])


def test_threads_change_no_bit() -> None:
    """Of a layer large enough to be cut among them."""
    gate, before = Gate("silu"), torch.get_num_threads()
    first = [[matrix(512, 256, 10 * expert + part, 0) for part in range(2)] for expert in range(4)]
    last = [matrix(256, 512, 10 * expert + 9) for expert in range(4)]
    run = PreparedExperts(on("cpu", PackedExperts(first, last, gate)))
    own = torch.Generator().manual_seed(0)
    x, index = torch.randn(24, 256, generator=own), torch.randint(0, 4, (24, 2), generator=own)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(x, index, torch.ones(24, 2)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_class_with_a_gate_of_its_own(name: str) -> None:
    experts = dataclasses.replace(layer(), gate=lambda first: torch.tanh(first[..., :INNER]) + first[..., INNER:])
    check(name, experts, *routed(6))


def test_half_types(name: str) -> None:
    x, index, weights = routed(9)
    experts = layer()
    y = packed_experts(x.bfloat16(), index, weights, on(name, experts))
    wanted = definition(experts, x.bfloat16(), index, weights)
    assert y.dtype == torch.bfloat16
    # The last rounding is all there is: at most half a unit of each value. "plain" rounds each product, and "cpu" may
    # multiply in bytes, which adds at most 2 % of nuq-3's distortion, 0.0345, in each of three products.
    bound = {"ref": 2**-8, "plain": 4 * 2**-8, "cpu": (3 * 0.02 * 0.0345) ** 0.5}[name]
    assert float((y.double() - wanted).norm()) <= bound * float(wanted.norm())


def test_compiled_whole(name: str) -> None:
    experts = on(name, layer(biased=True))
    x, index, weights = routed(6)
    compiled = torch.compile(
        lambda x, index, weights: packed_experts(x, index, weights, experts), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, index, weights), packed_experts(x, index, weights, experts))


def test_gradients_of_all_that_is_floating(name: str) -> None:
    stored = layer(GPT_OSS, biased=True)
    x, index, weights = routed(6)

    def with_biases(experts: PackedExperts, *biases: torch.Tensor) -> PackedExperts:
        return dataclasses.replace(experts, first_bias=biases[0], last_bias=biases[1])

    packed = on(name, stored)

    def run(x: torch.Tensor, weights: torch.Tensor, *biases: torch.Tensor) -> torch.Tensor:
        return packed_experts(x, index, weights, with_biases(packed, *biases))

    def exact(x: torch.Tensor, weights: torch.Tensor, *biases: torch.Tensor) -> torch.Tensor:
        return definition(with_biases(stored, *biases), x, index, weights)

    leaves = [
        torch.as_tensor(each).clone().requires_grad_() for each in (x, weights, stored.first_bias, stored.last_bias)
    ]
    wanted = torch.autograd.grad(exact(*leaves).square().sum(), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for found in (torch.autograd.grad(each(*leaves).square().sum(), leaves) for each in (run, compiled)):
        for share, due in zip(found, wanted, strict=True):
            assert float((share - due).norm()) <= 1e-5 * float(due.norm())
    bias_alone = run(x, weights, leaves[2], leaves[3].detach())
    (alone,) = torch.autograd.grad(bias_alone.square().sum(), leaves[2])
    assert float((alone - wanted[2]).norm()) <= 1e-5 * float(wanted[2].norm())


def test_operands_that_do_not_fit_are_named(name: str) -> None:
    run = PreparedExperts(on(name, layer()))
    x, index, weights = routed(4)
    for operands, message in (
        ((x[:, :-1], index, weights), "96 inputs"),
        ((x, index[:3], weights), "index and weights"),
        ((x, index.float(), weights), "integer index"),
        ((x, index, weights.long()), "floating weights"),
    ):
        with pytest.raises(InputError, match=message):
            run(*operands)
    uneven = layer()
    with pytest.raises(InputError, match="one shape"):
        PreparedExperts(dataclasses.replace(uneven, last=[*uneven.last[:-1], matrix(HIDDEN, INNER + 8, 1)]))
