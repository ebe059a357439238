"""Programs of compiled calls against the torch operations that they were recorded from, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.tolerance import float32_error
from torch.nn.functional import gelu, silu

from program_checks import FLOATS, UNITS, check, error
from qpalette.backends.cpu.step import Program, instructions_of
from qpalette.backends.cpu.step.program import Called
from qpalette.backends.cpu.step.scalars import ELEMENTWISE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# What torch rounds once is equal to the last bit. What it computes by a polynomial, as the kernels do by another, is
# within UNITS of float32; rounded to 16 bits, two such values may fall to either side, one unit apart.
EXACT: dict[str, Callable[..., torch.Tensor]] = {
    "_to_copy": lambda x, y: x.to(torch.bfloat16),
    "clone": lambda x, y: x.clone(),
    "copy": lambda x, y: torch.zeros(torch.broadcast_shapes(x.shape, y.shape), dtype=x.dtype).copy_(y),
    "fill": lambda x, y: torch.zeros_like(x).fill_(y.flatten()[0]),
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - 2 * y,
    "rsub": lambda x, y: 1.5 - x,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "relu": lambda x, y: x.relu(),
    "reciprocal": lambda x, y: x.reciprocal(),
    "pow": lambda x, y: x**2,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp_min": lambda x, y: x.clamp_min(0.3),
    "clamp_max": lambda x, y: x.clamp_max(0.3),
    "clamp": lambda x, y: x.clamp(-0.5, 0.3) + x.clamp(min=-0.1) + x.clamp(max=0.2),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "masked_fill": lambda x, y: x.masked_fill(x < 0.1, -torch.inf),
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= 0.5,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "logical_not": lambda x, y: (x > 0).logical_not(),
    "logical_and": torch.logical_and,
    "logical_or": lambda x, y: (x > 0).logical_or(y > 0),
    "bitwise_and": lambda x, y: (x > 0) & (y > 0.2),
    "bitwise_or": lambda x, y: (x > 0) | (y > 0.2),
}
CLOSE: dict[str, Callable[..., torch.Tensor]] = {
    "sqrt": lambda x, y: x.abs().sqrt(),
    "rsqrt": lambda x, y: x.abs().rsqrt(),
    "exp": lambda x, y: x.exp(),
    "log": lambda x, y: x.abs().log(),
    "sin": lambda x, y: x.sin(),
    "cos": lambda x, y: x.cos(),
    "tanh": lambda x, y: x.tanh(),
    "sigmoid": lambda x, y: x.sigmoid(),
    "silu": lambda x, y: silu(x.clamp(-90, 90)),
    "gelu": lambda x, y: torch.cat([gelu(x.clamp(-9, 9), approximate=each) for each in ("none", "tanh")]),
}
# Pairs of operands, of shapes that broadcast: contiguous, turned, cut, repeated, longer than a chunk, single.
LAYOUTS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "contiguous": lambda x: (x[:600].view(2, 3, 100), x[600:1200].view(2, 3, 100)),
    "turned": lambda x: (x[:600].view(5, 3, 40).transpose(0, 1), x[600:1200].view(40, 5, 3).permute(2, 1, 0)),
    "cut": lambda x: (x[:1400].view(2, 700)[:, 30:660:2], x[7:].as_strided((2, 315), (500, 1))),
    "repeated": lambda x: (x[:1300].view(2, 650), x[:2].view(2, 1)),
    "both repeated": lambda x: (x[:7].view(7, 1, 1), x[:20].view(4, 5)),
    "single": lambda x: (x[:9], x[77]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EXACT | CLOSE)
def test_elementwise(name, dtype, layout):
    values = torch.randn(1500).to(dtype)
    values[3], values[5], values[11] = torch.inf, -torch.inf, torch.nan
    x, y = LAYOUTS[layout](values)
    if name in EXACT:
        check(lambda: EXACT[name](x, y), lambda: values.neg_())
    else:
        check(lambda: CLOSE[name](x, y), lambda: values.mul_(1.7), UNITS if dtype == torch.float32 else 1)


def test_every_operation_of_the_table_is_tested():
    assert ELEMENTWISE.keys() == (EXACT | CLOSE).keys()


def test_integers():
    x, y = torch.randint(-9, 9, (4, 30)), torch.randint(1, 9, (30,))
    for work in (
        lambda: x + 3 * y,
        lambda: (x - y) * x,
        lambda: -x.abs(),
        lambda: x.clamp(-3, 5),
        lambda: torch.where(x > y, x, y),
        lambda: (x[:, :5] >= y[:5]) & (x[:, 5:10] != 0),
        lambda: x.to(torch.int32).add(y.to(torch.int32)),
        lambda: x.float() / y,
        lambda: x.masked_fill(x == 0, 100),
        lambda: (x > 0).long(),
    ):
        check(work, lambda: x.add_(1))


ROWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {  # and whether it is a sum
    "sum": (lambda x: x.sum(-1), True),
    "mean": (lambda x: x.mean(-1, keepdim=True), True),
    "of a middle dimension": (lambda x: x.mean(1), True),
    "of two": (lambda x: x.sum((1, 2)), True),
    "softmax": (lambda x: x.softmax(-1), True),
    "softmax of a middle dimension": (lambda x: x.softmax(1), True),
    "amax": (lambda x: x.amax(-1), False),
    "amin": (lambda x: x.amin(1, keepdim=True), False),
    "max": (lambda x: x.max(-1)[0] + x.max(-1)[1], False),
    "min": (lambda x: x.min(-1)[0], False),
    "argmax": (lambda x: x.argmax(-1), False),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ROWS)
def test_rows(name, dtype):
    """Sums differ by the order of float32 additions, and may then be rounded to the neighbour."""
    of, sums = ROWS[name]
    x = torch.randn(3, 5, 77).to(dtype)
    units = 0 if not sums else 1 if dtype != torch.float32 else 8
    check(lambda: of(x), lambda: x.mul_(-1.3), units)
    check(lambda: of(x.transpose(0, 1)), lambda: x.mul_(-1.3), units, native=name != "of two")


@pytest.mark.parametrize("size", [5, 16, 37, 700])
def test_the_place_of_the_largest_is_torchs_wherever_it_is(size):
    """Also of equal ones in other lanes, of infinities, and of a NaN, which is above all."""
    rows = torch.randint(-3, 4, (60, size)).float()
    rows[:20, size // 3] = 9
    rows[10:20, size - 1] = 9
    rows[20:30] = -torch.inf
    rows[25:30, size - 2] = -1e30
    rows[30:40, size // 2] = torch.nan
    rows[35:40, size - 1] = torch.nan
    rows[40:45, size // 4] = torch.inf
    check(lambda: rows.argmax(-1), lambda: rows.neg_())


def test_equal_numbers_and_nan_in_a_row():
    x = torch.tensor([[1.0, 5.0, 5.0, 2.0], [1.0, torch.nan, 9.0, torch.nan], [-torch.inf] * 4])
    check(lambda: x.argmax(-1))
    check(lambda: x.max(-1)[0])
    check(lambda: x.amin(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_by_index(dtype):
    x, where = (torch.randn(6, 7, 10) * 3).to(dtype), torch.tensor([4, 0, -0, 3])
    places, table = torch.randint(0, 7, (6, 2, 10)), torch.randn(20, 6)
    cache, three = x.clone(), torch.tensor([4, 0, 3])
    for work in (
        lambda: x.index_select(0, where),
        lambda: x.index_select(2, where),
        lambda: x.transpose(0, 1).index_select(1, where),
        lambda: x.gather(1, places),
        lambda: cache.index_copy_(1, where[:1], x[:, 2:3]),
        lambda: cache.transpose(0, 1).index_copy_(2, three, x[:, :, 5:8].transpose(0, 1)),
        lambda: torch.nn.functional.embedding(where.view(2, 2), table),
    ):
        check(work, lambda: where.fill_(2))


def test_an_index_out_of_range_is_an_error():
    table, where, result = torch.randn(9, 4), torch.tensor([3]), torch.zeros(1, 4)
    program = Program(instructions_of(lambda: result.copy_(table.index_select(0, where))))
    for wrong in (9, -10, 1 << 40):
        where.fill_(wrong)
        with pytest.raises(IndexError):
            program.replay()
    where.fill_(8)
    program.replay()
    assert torch.equal(result, table[8:])


def test_joined():
    x, y = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    check(lambda: torch.cat([-x[..., 3:], x[..., :3], y], -1), lambda: x.add_(1))
    check(lambda: torch.cat([x.transpose(1, 2), y.transpose(1, 2)], 1), lambda: x.add_(1))
    check(lambda: torch.stack([x[..., :4], y], -1).flatten(-2), lambda: x.add_(1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(1, 64, 48), (3, 37, 19), (16, 128, 5), (2, 700, 600)])
def test_products(sizes, dtype):
    """Sums in float32, rounded once: half a unit of the type at most, beside what float32 allows."""
    vectors, inputs, columns = sizes
    x, bias = torch.randn(vectors, inputs).to(dtype), torch.randn(columns).to(dtype)
    rows, turned = torch.randn(columns, inputs).to(dtype), torch.randn(inputs, columns).to(dtype)
    several, others = torch.randn(4, vectors, inputs).to(dtype), torch.randn(4, columns, inputs).to(dtype)
    allowed = float32_error(inputs + 1) + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    for work, exact in (
        (lambda: x @ rows.T, lambda: x.double() @ rows.double().T),
        (lambda: torch.addmm(bias, x, rows.T), lambda: bias.double() + x.double() @ rows.double().T),
        (lambda: torch.addmm(bias, x, turned), lambda: bias.double() + x.double() @ turned.double()),
        (lambda: several @ others.transpose(1, 2), lambda: several.double() @ others.double().transpose(1, 2)),
        (lambda: several[:1] @ turned, lambda: several[:1].double() @ turned.double()),
    ):
        result = torch.zeros_like(work())
        instructions = instructions_of(lambda: result.copy_(work()))  # noqa: B023 - runs here
        assert not any(isinstance(each, Called) for each in instructions)
        Program(instructions).replay()
        assert error(result, exact()) <= allowed


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(3, 3, 64, True), (2, 1, 8, False), (1, 5, 40, True)])
def test_attention(sizes, dtype):
    """Inner values are float32; half a unit of the type for the result, and u sqrt(n) for the two sums."""
    heads, queries, width, masked = sizes
    query = torch.randn(2, heads, queries, width).to(dtype)
    key, value = (torch.randn(2, 50, heads, width).to(dtype).transpose(1, 2) for _ in range(2))
    mask = torch.zeros(2, 1, 1, 50, dtype=dtype) if masked else None
    if mask is not None:
        mask[0, ..., 9:] = mask[1, ..., :5] = -torch.inf
    result = torch.zeros_like(query)

    def work() -> None:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result.copy_(operator(query, key, value, 0.0, False, attn_mask=mask)[0])

    instructions = instructions_of(work)
    assert not any(isinstance(each, Called) for each in instructions)
    program = Program(instructions)
    for _ in range(2):
        program.replay()
        scores = query.double() @ key.double().transpose(2, 3) * width**-0.5
        exact = (scores if mask is None else scores + mask).softmax(-1) @ value.double()
        assert error(result, exact) <= 4 * float32_error(width + 50) + torch.finfo(dtype).eps / 2
        query.neg_()


@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_of_a_sequence_is_the_same_bits_in_any_company(dtype):
    """With any number of threads; whatever hidden keys hold, also where queries of a sequence see different ones."""
    batch, heads, queries, keys, width = 5, 6, 3, 400, 72
    query = torch.randn(batch, heads, queries, width).to(dtype)
    key, value = (torch.randn(batch, heads, keys, width).to(dtype) for _ in range(2))
    mask = torch.zeros(batch, 1, queries, keys, dtype=dtype)
    for sequence in range(batch):
        mask[sequence, ..., : 30 * sequence] = mask[sequence, :, 1, 40 * sequence + 90 :] = -torch.inf
        key[sequence, :, : 30 * sequence] = value[sequence, :, : 30 * sequence] = torch.nan

    def attended(chosen: slice, threads: int) -> torch.Tensor:
        result, before = torch.zeros_like(query[chosen]), torch.get_num_threads()

        def work() -> None:
            operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            found = operator(query[chosen], key[chosen], value[chosen], 0.0, False, attn_mask=mask[chosen])
            result.copy_(found[0])

        program = Program(instructions_of(work))
        torch.set_num_threads(threads)
        program.replay()
        torch.set_num_threads(before)
        return result

    together = attended(slice(None), 1)
    assert torch.equal(together, attended(slice(None), 2))
    for sequence in range(batch):
        assert torch.equal(together[sequence : sequence + 1], attended(slice(sequence, sequence + 1), 1))
        seen = slice(30 * sequence, None)
        scores = query[sequence].double() @ key[sequence, :, seen].double().mT * width**-0.5
        exact = (scores + mask[sequence, ..., seen]).softmax(-1) @ value[sequence, :, seen].double()
        assert error(together[sequence], exact) <= 4 * float32_error(width + keys) + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm(dtype):
    x, weight, bias = torch.randn(3, 2, 90).to(dtype) + 2, torch.randn(90).to(dtype), torch.randn(90).to(dtype)
    units = 8 if dtype == torch.float32 else 1
    check(lambda: torch.nn.functional.layer_norm(x, (90,), weight, bias, 1e-5), lambda: x.mul_(-2), units)
    check(lambda: torch.nn.functional.layer_norm(x, (90,)), lambda: x.mul_(-2), units)
