"""What a packed module shows as its weight: the decoded matrix, whatever code does with it."""

from __future__ import annotations

import copy
from itertools import count

import pytest
import torch
import torch.nn.functional as F

from qpalette.core.errors import UnsupportedError
from qpalette.core.records import LinearRecord
from qpalette.formats.parts import parts_of
from qpalette.nn import QuantEmbedding, QuantLinear
from qpalette.nn.packed_weight import PackedStack, PackedWeight
from qpalette.rotate import rotation_for
from tolerance import check_float32

CPU = torch.device("cpu")
NUMBER = count()


def packed(kind=QuantLinear, rows: int = 40, columns: int = 48, dtype=torch.float32, **options):
    torch.manual_seed(next(NUMBER))
    record = LinearRecord("nuq-4", rows, columns, rotation_for(columns, "full").name, 0)
    module = kind(record, dtype=dtype, **options)
    module.load_state_dict({part.suffix: part.random(record, CPU) for part in parts_of(record)}, strict=False)
    module.prepare()
    return module


@pytest.mark.parametrize("kind", [QuantLinear, QuantEmbedding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_shape_and_values_are_those_of_the_decoded_matrix(kind, dtype):
    module = packed(kind, dtype=dtype)
    weight, dense = module.weight, module.dequantized_weight().to(dtype)
    assert (weight.dtype, weight.shape, weight.device) == (dense.dtype, dense.shape, dense.device)
    for compute in (torch.sum, lambda w: w[3:5].float(), lambda w: w.T @ torch.ones(40, dtype=dtype), torch.clone):
        result = compute(weight)
        assert type(result) is torch.Tensor
        assert torch.equal(result, compute(dense))
    assert module.to(torch.float64 if kind is QuantLinear else torch.float16).weight.dtype != dtype


TERMS = 48 * 4 + 4  # the sum, the rotation's factors, scale and bias, on both sides


def product(x, weight):
    return F.linear(x.double(), weight.double())


def test_products_are_those_of_the_packed_matrix():
    module, x, bias = packed(), torch.randn(2, 5, 48), torch.randn(40)
    operands = (x, module.dequantized_weight())
    check_float32(F.linear(x, module.weight), product, operands, TERMS)
    check_float32(F.linear(x, module.weight, bias), lambda x, w: product(x, w) + bias.double(), operands, TERMS)
    check_float32(module.weight @ x.mT, lambda x, w: product(x, w).mT, operands, TERMS)


def test_nothing_is_written_into_it():
    with pytest.raises(UnsupportedError, match="cannot be written to"):
        packed().weight.mul_(2)


def test_the_weight_of_a_conv1d_lies_the_other_way():
    module = packed(transposed=True)
    assert module.weight.shape == (48, 40)
    assert torch.equal(module.weight.clone(), module.dequantized_weight().T)
    ordinary, x = module.dequantize(torch.float32), torch.randn(3, 48)
    assert type(ordinary).__name__ == "Conv1D"
    check_float32(module(x), lambda x, w: x.double() @ w.double(), (x, ordinary.weight.detach()), TERMS)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_experts(transposed):
    experts = [[packed(), packed()] for _ in range(3)]
    stack = PackedStack(experts, transposed)
    dense = torch.stack([torch.cat([linear.dequantized_weight() for linear in expert]) for expert in experts])
    dense = dense.mT if transposed else dense
    assert stack.shape == dense.shape
    assert torch.equal(stack.clone(), dense)
    one = stack[torch.tensor(1)]
    assert isinstance(one, PackedWeight)
    assert torch.equal(one.clone(), dense[1])
    x = torch.randn(3, 4, 48)
    result = torch.bmm(x, stack if transposed else stack.mT)
    operands = (x, dense if transposed else dense.mT)
    check_float32(result, lambda x, w: torch.bmm(x.double(), w.double()), operands, TERMS)
    assert copy.deepcopy(one) is one
