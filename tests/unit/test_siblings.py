"""Packed linears that read one input: one joint product, and the same results as one by one."""

import pytest
import torch
from torch import nn

from qpalette.core.records import LinearRecord
from qpalette.nn import QuantLinear, join_siblings
from qpalette.runtime import backends

SPECS = {"q": "tcq-2.5-L12", "k": "vq-3", "v": "nuq-4", "other": "nuq-2"}
INPUTS = 64


class Attention(nn.Module):
    """q, k and v share their signs; `other` reads another input."""

    def __init__(self) -> None:
        super().__init__()
        signs = torch.randint(0, 256, (INPUTS // 8,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        for seed, (name, spec) in enumerate(SPECS.items()):
            random = torch.Generator().manual_seed(seed)
            linear = QuantLinear(LinearRecord(spec, 48, INPUTS, "h64", 0), bias=name == "k", dtype=torch.float32)
            linear.qp_codes.random_(-(2**31), 2**31, generator=random)
            linear.qp_scales.copy_(torch.rand(48, generator=random).half().view(torch.int16))
            linear.qp_signs.copy_(signs if name != "other" else ~signs)
            if linear.bias is not None:
                nn.init.constant_(linear.bias, 0.5)
            setattr(self, name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x), self.other(2 * x)], dim=-1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of matrices of each joint product of the reference backend, the only one allowed."""
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    calls: list[int] = []
    reference = type(backends()["ref"])
    original = reference.linears

    def linears(self, x, members):
        calls.append(len(members))
        return original(self, x, members)

    monkeypatch.setattr(reference, "linears", linears)
    return calls


def test_joined_linears_give_the_same(counted: list[int]) -> None:
    model, x = Attention(), torch.randn(2, 3, INPUTS, generator=torch.Generator().manual_seed(9))
    expected = model(x)
    assert join_siblings(model) == 1
    assert torch.equal(model(x), expected)
    assert counted == [3]
    assert torch.equal(model(x + 1), Attention()(x + 1))
    assert counted == [3, 3]


def test_a_sibling_called_with_another_tensor_computes_anew(counted: list[int]) -> None:
    model = Attention()
    x = torch.randn(1, INPUTS, generator=torch.Generator().manual_seed(9))
    expected = model.k(x.clone())
    join_siblings(model)
    model.q(torch.zeros(1, INPUTS))
    assert torch.equal(model.k(x), expected)
    assert torch.equal(model.k(x), expected)  # asked twice: computed twice, never a result used up
    assert counted == [3, 3, 3]


def test_a_backend_that_does_not_fuse_is_left_alone() -> None:
    model = Attention()
    for linear in model.children():
        linear.prepare()
    assert join_siblings(model) == 0


def test_joined_linears_compile_into_one_graph(counted: list[int]) -> None:
    model, x = Attention(), torch.randn(2, INPUTS, generator=torch.Generator().manual_seed(9))
    expected = model(x)
    join_siblings(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert counted == [3]


def test_the_operator_is_well_formed() -> None:
    model, x = Attention(), torch.randn(2, INPUTS)
    members = [model.q.packed, model.k.packed]
    arguments = (
        x,
        [member.codes for member in members],
        [member.scales for member in members],
        members[0].signs,
        [member.spec for member in members],
        "h64",
        "tiles",
        [48, 48],
    )
    torch.library.opcheck(torch.ops.qpalette.linears.default, arguments)
