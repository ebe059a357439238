"""The module of a layer's experts: one operator, of the tensors that its children have now."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

from qpalette.core.errors import UnsupportedError
from qpalette.core.records import LinearRecord
from qpalette.nn import QuantExperts, QuantLinear
from qpalette.nn.quant_experts import _gate_of
from qpalette.rotate import rotation_for
from qpalette.runtime import Gate, in_runs

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from experts import random_layer

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([[0, 2], [3, 4], [1, 1], [-1, 2], [0, 3]])  # 4 and -1 are no experts
WEIGHTS = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layer() -> QuantExperts:
    return random_layer(4, 64, 48, "nuq-4").requires_grad_(False)


def one_by_one(layer: QuantExperts) -> torch.Tensor:
    return in_runs(X, INDEX, WEIGHTS, 4, layer._run)


def test_children_are_not_called(layer: QuantExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_by_one(layer)
    monkeypatch.setattr("qpalette.nn.QuantLinear.forward", lambda *_: pytest.fail("called"))
    assert torch.allclose(layer(X, INDEX, WEIGHTS), expected, rtol=1e-5, atol=1e-7)


def test_what_is_exchanged_is_seen(layer: QuantExperts) -> None:
    """Tensors put in the place of others, written to, moved, fitted, wrapped; in a copy, too."""
    down = layer.get_submodule("2.down_proj")
    before = layer(X, INDEX, WEIGHTS)

    def changes() -> None:
        nonlocal before
        now = layer(X, INDEX, WEIGHTS)
        assert torch.allclose(now, one_by_one(layer), rtol=1e-5, atol=1e-7)
        assert not torch.equal(now, before)
        before = now

    down.qp_scales.copy_((2 * down.qp_scales.view(torch.float16)).view(torch.int16))
    changes()
    down.qp_scales = (2 * down.qp_scales.view(torch.float16)).view(torch.int16)
    changes()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["0.up_proj.qp_codes"] = ~state["0.up_proj.qp_codes"]
    layer.load_state_dict(state)
    changes()
    (scales,) = down.fit("scales")
    scales.data *= 2
    changes()
    layer(X, INDEX, WEIGHTS).square().sum().backward()
    assert float(scales.grad.abs().max()) > 0
    down.settle()
    assert torch.allclose(layer(X, INDEX, WEIGHTS), before, rtol=1e-2, atol=1e-4)
    twin = copy.deepcopy(layer)
    twin.get_submodule("0.down_proj").qp_scales.zero_()
    assert not torch.equal(twin(X, INDEX, WEIGHTS), layer(X, INDEX, WEIGHTS))
    layer.get_submodule("1").down_proj = torch.nn.Sequential(layer.get_submodule("1.down_proj"), torch.nn.Tanh())
    before = layer(X, INDEX, WEIGHTS)
    assert torch.allclose(before, one_by_one(layer), rtol=1e-5, atol=1e-7)


def test_prepared_once_beside_other_products(layer: QuantExperts) -> None:
    """What another packed linear prepares at its first product is no exchange of tensors."""
    record = LinearRecord("nuq-4", 64, 64, rotation_for(64, "full").name, 0, "other")
    other = QuantLinear(record)
    layer(X, INDEX, WEIGHTS)
    prepared = layer._operator
    other(X)
    assert other._prepared is not None
    layer(X, INDEX, WEIGHTS)
    assert layer._operator is prepared


def traced(layer: QuantExperts) -> tuple[Any, list[int]]:
    """The layer compiled, and how many operands each graph has that torch made of it."""
    operands: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        operands.append(len(inputs))
        return lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    return torch.compile(layer, fullgraph=True, backend=backend), operands


def test_compiled_whole(layer: QuantExperts) -> None:
    compiled, operands = traced(layer)
    assert torch.equal(compiled(X, INDEX, WEIGHTS), layer(X, INDEX, WEIGHTS))
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(compiled(x, INDEX, WEIGHTS).square().sum(), x)
    (wanted,) = torch.autograd.grad(one_by_one_of(layer, x).square().sum(), x)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert operands == [4, 4]  # what came in, and one expert's codes: however many experts there are


def test_compiled_with_biases_and_a_gate_of_its_own(layer: QuantExperts) -> None:
    own = torch.Generator().manual_seed(3)
    for name, size in (("gate_up_proj_bias", 96), ("down_proj_bias", 64)):
        layer.register_parameter(name, torch.nn.Parameter(torch.randn(4, size, generator=own)))
    layer._gate = lambda first: first[..., :48].tanh() * first[..., 48:]
    compiled, _ = traced(layer)
    biases = [layer.gate_up_proj_bias, layer.down_proj_bias]
    found, wanted = compiled(X, INDEX, WEIGHTS), one_by_one(layer)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    shares = zip(*(torch.autograd.grad(each.square().sum(), biases) for each in (found, wanted)), strict=True)
    assert all(torch.allclose(share, due, rtol=1e-4, atol=1e-4) for share, due in shares)


def test_compiled_sees_what_is_exchanged(layer: QuantExperts) -> None:
    """Without being compiled again; a copy is compiled for its own; what no operator computes is told."""
    compiled, operands = traced(layer)
    before, down = compiled(X, INDEX, WEIGHTS), layer.get_submodule("2.down_proj")
    down.qp_scales = (2 * down.qp_scales.view(torch.float16)).view(torch.int16)
    after = compiled(X, INDEX, WEIGHTS)
    assert torch.equal(after, layer(X, INDEX, WEIGHTS))
    assert not torch.equal(after, before)
    assert len(operands) == 1
    twin = copy.deepcopy(layer)
    twin.get_submodule("0.down_proj").qp_scales.zero_()
    assert torch.equal(torch.compile(twin, backend="aot_eager")(X, INDEX, WEIGHTS), twin(X, INDEX, WEIGHTS))
    down.fit("scales")
    with pytest.raises(UnsupportedError, match="compile it again"):
        compiled(X, INDEX, WEIGHTS)
    torch.compiler.reset()
    assert torch.allclose(
        torch.compile(layer, backend="eager")(X, INDEX, WEIGHTS), one_by_one(layer), rtol=1e-5, atol=1e-7
    )


def test_exported_with_its_tensors(layer: QuantExperts) -> None:
    """What is exported runs where nobody knows this process' names."""
    program = torch.export.export(layer, (X, INDEX, WEIGHTS))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "qpalette.experts.default" in called
    assert torch.equal(program.module()(X, INDEX, WEIGHTS), layer(X, INDEX, WEIGHTS))


def one_by_one_of(layer: QuantExperts, x: torch.Tensor) -> torch.Tensor:
    return in_runs(x, INDEX, WEIGHTS, 4, layer._run)


def test_gates_of_classes_are_recognised(layer: QuantExperts) -> None:
    assert layer._gate == Gate("silu")
    experts = GptOssExperts(GptOssConfig(num_local_experts=2, hidden_size=16, intermediate_size=16))
    assert _gate_of(experts) == Gate("silu", True, True, 7.0, 1.702, 1.0)
    experts.act_fn, experts._apply_gate = None, lambda first: first[..., ::2].tanh() * first[..., 1::2]
    assert not isinstance(_gate_of(experts), Gate)
