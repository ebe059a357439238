"""Gradients through packed matrices: those of the same weights unpacked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qpalette.core.errors import InputError
from qpalette.core.records import FLOAT16, SIGNS, LinearRecord
from qpalette.nn import QuantEmbedding, QuantLinear, TiedHead
from qpalette.nn.quant_embedding import packed_rows
from qpalette.rotate import Rotation, diagonal_of, rotation_for
from qpalette.runtime import keeping, packed_linear

ROWS, COLUMNS = 80, 96
BATCHES = (1, 9, 16, 17, 40, 64)
PLACES = [
    ("cpu", "ref"),
    ("cpu", "cpu"),
    pytest.param("cuda", "ref", marks=pytest.mark.device),
    pytest.param("cuda", "cuda", marks=pytest.mark.device),
]


def filled(record: LinearRecord, module: type = QuantLinear, device: str = "cpu", **options: object) -> nn.Module:
    """A packed module of random codes, scales between 0.5 and 1.5, and random signs or a random diagonal."""
    random, made = torch.Generator().manual_seed(0), module(record, **options)
    made.qp_codes.random_(-(2**31), 2**31, generator=random)
    made.qp_scales.copy_((torch.rand(record.out_features, generator=random) + 0.5).half().view(torch.int16))
    if record.diagonal == SIGNS:
        made.qp_signs.random_(0, 256, generator=random)
    else:
        values = torch.rand(record.in_features, generator=random) + 0.5
        made.qp_diagonal.copy_(values.half().view(torch.int16))
    made = made.to(device)
    made.prepare()
    return made


def record_of(spec: str, diagonal: str = SIGNS, rotation: str = "full") -> LinearRecord:
    return LinearRecord(spec, ROWS, COLUMNS, rotation_for(COLUMNS, rotation).name, 0, "g", diagonal)


def weight_of(module: nn.Module, scales: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """W, float64, as a function of float64 scales and diagonal."""
    packed = module.stored
    unscaled = module.backend.rotated_weight(packed).double() / packed.scales.view(torch.float16).double()[:, None]
    turned = Rotation.parse(packed.rotation, packed.in_features).inverse(unscaled)
    return scales[:, None] * turned * diagonal


def bound(dtype: torch.dtype) -> float:
    """Of the relative error of a gradient, as norms: a sum of up to ROWS terms, a rotation of COLUMNS, and the rounding
    of what goes in and out, each term with half a unit of its type; errors of random sign add up as a square root."""
    unit = torch.finfo(dtype).eps / 2
    return 2 * ((ROWS**0.5 + COLUMNS**0.5) * 2**-24 + 4 * unit)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).detach().norm() / exact.detach().norm())


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("diagonal", [SIGNS, FLOAT16])
@pytest.mark.parametrize("spec", ["nuq-4", "tcq2-2.5-L12"])
def test_of_the_input(spec: str, diagonal: str, device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPALETTE_BACKEND", backend)
    module = filled(record_of(spec, diagonal), device=device)
    weight = module.dequantized_weight().double()
    for tokens in BATCHES:
        random = torch.Generator(device).manual_seed(tokens)
        x = torch.randn(tokens, COLUMNS, device=device, generator=random).requires_grad_()
        upstream = torch.randn(tokens, ROWS, device=device, generator=random)
        module(x).backward(upstream)
        exact = upstream.double() @ weight
        assert distance(x.grad, exact) <= bound(torch.float32), tokens
        assert distance((upstream.half().double() @ weight), exact) > bound(torch.float32)  # what the bound can tell


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("diagonal", [SIGNS, FLOAT16])
def test_of_scales_and_diagonal(diagonal: str, device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPALETTE_BACKEND", backend)
    module = filled(record_of("tcq-2-L12", diagonal), device=device)
    scales, turns = module.fit("scales", "diagonal")
    exact = [parameter.detach().double().requires_grad_() for parameter in (scales, turns)]
    for tokens in BATCHES:
        random = torch.Generator(device).manual_seed(tokens)
        x = torch.randn(tokens, COLUMNS, device=device, generator=random)
        upstream = torch.randn(tokens, ROWS, device=device, generator=random)
        found = torch.autograd.grad(module(x), [scales, turns], upstream)
        product = x.double() @ weight_of(module, *exact).T
        wanted = torch.autograd.grad(product, exact, upstream.double())
        # Sums over the tokens on top; on a GPU the products of the forward pass have float16 operands.
        limit = bound(torch.float16 if backend == "cuda" else torch.float32) * tokens**0.5
        assert [distance(*pair) <= limit for pair in zip(found, wanted, strict=True)] == [True, True], tokens


def test_what_was_fitted_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = filled(record_of("nuq-3")), torch.randn(3, COLUMNS)
    before = module(x)
    scales, turns = module.fit("scales", "diagonal")
    assert torch.allclose(module(x), before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        scales.mul_(1.25)
        turns.mul_(0.5)
    fitted = module(x)
    module.settle()
    assert module.record.diagonal == FLOAT16
    assert set(module.state_dict()) == {"qp_codes", "qp_scales", "qp_diagonal"}
    assert torch.allclose(module(x), fitted, rtol=2**-9, atol=1e-2)
    with pytest.raises(ValueError, match="'codes' cannot be fitted: choose scales, diagonal"):
        module.fit("codes")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    module, x = filled(record_of("nuq-4")), torch.randn(5, COLUMNS, requires_grad=True)
    torch.compile(module, backend=backend, fullgraph=True)(x).square().sum().backward()
    exact = 2 * (x.double() @ module.dequantized_weight().double().T) @ module.dequantized_weight().double()
    assert distance(x.grad, exact) <= 2 * bound(torch.float32)


def test_of_the_gradient() -> None:
    """A penalty on a gradient has a gradient itself."""
    module, x = filled(record_of("nuq-4")), torch.randn(5, COLUMNS, requires_grad=True)
    weight = module.dequantized_weight()
    plain = x.detach().clone().requires_grad_()
    for product, leaf in ((module(x), x), (plain @ weight.T, plain)):
        (first,) = torch.autograd.grad(product.square().sum(), leaf, create_graph=True)
        first.square().sum().backward()
    assert distance(x.grad, plain.grad.double()) <= 4 * bound(torch.float32)


@pytest.mark.parametrize("fields", [("scales",), ("diagonal",), ("scales", "diagonal")])
def test_of_an_embedding_and_its_head(fields: tuple[str, ...]) -> None:
    module = filled(record_of("nuq-4"), QuantEmbedding, multiplied=True)
    parameters, head = module.fit(*fields), TiedHead(module)
    exact = [getattr(module, "fitted_" + field).detach().double().requires_grad_() for field in fields]
    values = {"scales": module.stored.scales.view(torch.float16).double()}
    values["diagonal"] = diagonal_of(module.stored.diagonal, COLUMNS).double()
    values |= dict(zip(fields, exact, strict=True))
    weight = weight_of(module, values["scales"], values["diagonal"])
    ids, x = torch.randint(ROWS, (7, 3)), torch.randn(4, COLUMNS)
    loss = packed_rows(ids, module.packed).square().sum() + head(x).square().sum()
    wanted = weight[ids].square().sum() + (x.double() @ weight.T).square().sum()
    for found, due in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, exact), strict=True):
        assert distance(found, due) <= 4 * bound(torch.float32)


def test_a_wrong_operand_is_an_error() -> None:
    """Whoever calls, whatever the backend: the door is one."""
    module = filled(record_of("nuq-4"))
    packed, x = module.packed, torch.randn(2, COLUMNS)
    wrong = {
        "of 96 inputs cannot take a tensor of shape \\[2, 63\\]": (x[:, :63], packed),
        "takes float16, bfloat16, float32 or float64, got torch.int64": (x.long(), packed),
        "the scales of 80 rows are int16 \\[80\\], got torch.int16 \\[79\\]": (
            x,
            packed.with_(scales=packed.scales[1:]),
        ),
        "the scales of 80 rows are int16 \\[80\\], got torch.int32": (x, packed.with_(scales=packed.scales.int())),
        "the diagonal of 96 inputs is": (x, packed.with_(diagonal=packed.diagonal[1:])),
        "codes are int32, got torch.int64": (x, packed.with_(codes=packed.codes.long())),
        "its codes on cpu, its scales on meta": (x, packed.with_(scales=packed.scales.to("meta"))),
    }
    for message, (vectors, matrix) in wrong.items():
        with pytest.raises(InputError, match=message):
            packed_linear(vectors, matrix)
    stored = filled(record_of("nuq-4"), QuantEmbedding).packed  # in the stored layout
    with pytest.raises(InputError, match="codes of 80 x 96 in nuq-4 are"):
        packed_linear(x, stored.with_(codes=stored.codes[1:]))


@pytest.mark.parametrize("ids", [[-1], [0, ROWS]])
def test_an_id_out_of_range_is_an_error(ids: list[int]) -> None:
    module = filled(record_of("nuq-4"), QuantEmbedding)
    with pytest.raises(IndexError, match=f"id {ids[-1]} is out of range for a packed embedding of 80 rows"):
        module(torch.tensor(ids))
    with pytest.raises(InputError, match=r"ids of rows are int32 or int64, got torch\.float32"):
        module(torch.tensor([1.0]))
    assert torch.equal(module(torch.tensor([3], dtype=torch.int32)), module(torch.tensor([3])))


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_what_is_kept_while_it_is_fitted_gives_the_same_bits_and_is_decoded_once(
    device, backend, budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QPALETTE_BACKEND", backend)
    module = filled(record_of("nuq-4", FLOAT16), device=device)
    parameters = module.fit("scales", "diagonal")
    x = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    decoded = []
    original = type(module.backend).rotated_weight

    def counted(self, packed):
        decoded.append(packed)
        return original(self, packed)

    monkeypatch.setattr(type(module.backend), "rotated_weight", counted)

    def pass_through() -> list[torch.Tensor]:
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]

    def both() -> list[list[torch.Tensor]]:
        """Before and after a step, which changes parameters in place."""
        results = []
        for values in start, [1.25 * value for value in start]:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data.copy_(value)
            results.append(pass_through())
        return results

    start = [parameter.detach().clone() for parameter in parameters]
    expected, times = both(), len(decoded)
    with keeping(budget):
        found = both()
    assert times >= 2
    assert len(decoded) == 2 * times - bool(budget)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
