"""Packed linears that read one input: one joint product, and the same results as one by one."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from qpalette.core.errors import ArtifactError
from qpalette.core.records import LinearRecord
from qpalette.nn import QuantLinear, join_launches
from qpalette.nn.fuse_graph import FuseLaunches
from qpalette.runtime import backends

SPECS = {"q": "tcq-2.5-L12", "k": "vq-3", "v": "nuq-4", "other": "nuq-2"}
INPUTS = 64


class Attention(nn.Module):
    """q, k and v are of one group; `other` reads another input."""

    def __init__(self, groups: bool = True) -> None:
        super().__init__()
        signs = torch.randint(0, 256, (INPUTS // 8,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        for seed, (name, spec) in enumerate(SPECS.items()):
            random = torch.Generator().manual_seed(seed)
            group = ("other" if name == "other" else "qkv") if groups else ""
            record = LinearRecord(spec, 48, INPUTS, "h64", 0, group)
            linear = QuantLinear(record, bias=name == "k", dtype=torch.float32)
            linear.qp_codes.random_(-(2**31), 2**31, generator=random)
            linear.qp_scales.copy_(torch.rand(48, generator=random).half().view(torch.int16))
            linear.qp_signs.copy_(signs if name != "other" else ~signs)
            if linear.bias is not None:
                nn.init.constant_(linear.bias, 0.5)
            setattr(self, name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x), self.other(2 * x)], dim=-1)


def random_input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of matrices of each joint product of the reference backend, the only one allowed."""
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    calls: list[int] = []
    reference = type(backends()["ref"])
    original = reference.linears

    def linears(self, x, members):
        if len(members) > 1:
            calls.append(len(members))
        return original(self, x, members)

    monkeypatch.setattr(reference, "linears", linears)
    return calls


@pytest.mark.parametrize("groups", [True, False], ids=["by the stored id", "of an old version, by equal signs"])
def test_joined_linears_give_the_same(counted: list[int], groups: bool) -> None:
    model, x = Attention(groups), random_input(2, 3)
    expected = model(x)
    assert join_launches(model) == 1
    assert torch.equal(model(x), expected)
    assert counted == [3]
    assert torch.equal(model(x + 1), Attention()(x + 1))
    assert counted == [3, 3]


def refilled(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return x.copy_(values)


def scaled(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return x.mul_(3)


@pytest.mark.parametrize("write", [refilled, scaled])
@pytest.mark.parametrize("asked", [("q",), ("q", "k")])
def test_an_input_that_was_written_to_is_multiplied_anew(
    counted: list[int], write: Callable[..., torch.Tensor], asked: tuple[str, ...]
) -> None:
    model, x = Attention(), random_input(2)
    join_launches(model)
    for name in asked:
        getattr(model, name)(x)
    write(x, random_input(2) - 1)
    for name in SPECS:
        assert torch.equal(getattr(model, name)(x), getattr(Attention(), name)(x.clone())), name


def test_a_member_asked_twice_computes_twice(counted: list[int]) -> None:
    model, x = Attention(), random_input(1)
    join_launches(model)
    expected = Attention().k(x.clone())
    assert torch.equal(model.k(x), expected)
    assert torch.equal(model.k(x), expected)


def test_nothing_stays_behind(counted: list[int]) -> None:
    """Results wait on the input alone: with it they are gone, also after an exception in the middle."""
    model = Attention()
    join_launches(model)
    x = random_input(2)
    kept = weakref.ref(model.q(x)._base)
    assert kept() is not None  # what k and v will find
    del x
    gc.collect()
    assert kept() is None
    copied = copy.deepcopy(model)
    x = random_input(2)
    assert torch.equal(copied(x), Attention()(x))
    assert copied.q.launch is not model.q.launch
    assert copied.q.launch.members[0] is copied.q


def test_threads_do_not_swap_results(counted: list[int]) -> None:
    model = Attention()
    join_launches(model)
    inputs = [random_input(1) + index for index in range(8)]
    expected = [Attention()(x.clone()) for x in inputs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(model(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_a_version_each_computes_its_own(counted: list[int]) -> None:
    model = Attention()
    join_launches(model)
    with torch.inference_mode():
        x = random_input(2) * 1
        model.q(x)
        x.mul_(2)
        assert torch.equal(model.k(x), Attention().k(x.clone()))
    assert counted == []


def test_a_group_of_different_signs_is_refused(counted: list[int]) -> None:
    model = Attention()
    for linear in model.children():
        linear.record = replace(linear.record, group="one")
    with pytest.raises(ArtifactError, match="linears of group 'one' in  have different signs"):
        join_launches(model)


def test_a_backend_that_does_not_fuse_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backends()["cpu"]), "fuses", False)
    model = Attention()
    for linear in model.children():
        linear.prepare()
    assert join_launches(model) == 0


class Written(nn.Module):
    """Writes to the input between two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        first = self.inner.q(x)
        x.mul_(3)
        return torch.cat([first, self.inner.k(x), self.inner.v(x)], dim=-1)


@pytest.mark.parametrize("kind", [Attention, Written])
def test_joined_linears_compile_into_one_launch(counted: list[int], kind: type[nn.Module]) -> None:
    model, x = kind(), random_input(2)
    expected = model(x)
    join_launches(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        counted.clear()
        assert torch.equal(compiled(x), expected)
    assert counted == [3 if kind is Attention else 2]


def test_the_pass_runs_after_that_of_somebody_else() -> None:
    seen = []
    graph = torch.fx.Graph()
    FuseLaunches(before=seen.append)(graph)
    assert seen == [graph]


def test_the_operator_is_well_formed() -> None:
    model, x = Attention(), random_input(2).requires_grad_()
    members = [model.q.packed, model.k.packed]
    arguments = (
        x,
        [member.codes for member in members],
        [member.scales for member in members],
        members[0].diagonal,
        [member.spec for member in members],
        "h64",
        "tiles",
        [48, 48],
        INPUTS,
    )
    torch.library.opcheck(torch.ops.qpalette.linears.default, arguments)
