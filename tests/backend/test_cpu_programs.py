"""Programs of compiled calls: packed products in them; records, and memory, random numbers and values."""

from __future__ import annotations

import pytest
import torch
from tests.tolerance import float32_error

from program_checks import FLOATS, UNITS, check, error
from qpalette.backends.cpu.step import Program, instructions_of
from qpalette.backends.cpu.step.program import Called
from qpalette.codes import parse_spec
from qpalette.core.errors import UnsupportedError
from qpalette.nn.quant_embedding import packed_rows
from qpalette.rotate import pack_signs, random_signs, rotation_for
from qpalette.runtime import PackedLinear, packed_linear, select


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- packed ------------------------------------------------------------------------------------------------------


def packed(rows: int, columns: int, spec: str, name: str, laid_out: bool = True) -> PackedLinear:
    rotation, signs = rotation_for(columns, "full"), random_signs(columns, 0, name)
    tiles = torch.randn(-(-rows // 16) * -(-columns // 16), 256)
    backend = select("linear", spec, torch.device("cpu"))
    codes = backend.encode(spec, tiles).reshape(-(-rows // 16), -(-columns // 16), -1)
    scales = (torch.rand(rows) + 0.5).half().view(torch.int16)
    plain = PackedLinear(codes, scales, pack_signs(signs), spec, rotation.name, rows, columns)
    if not laid_out:
        return plain
    return PackedLinear(
        backend.to_layout(codes, spec), scales, plain.diagonal, spec, rotation.name, rows, columns, backend.layout
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_products_are_the_same_bits_and_those_of_a_group_one_launch(dtype):
    members, x = [packed(rows, 96, "nuq-4", "group") for rows in (64, 40)], torch.randn(2, 1, 96).to(dtype)
    alone = packed(96, 48, "tcq-2-L12", "other")

    def work() -> torch.Tensor:
        first = packed_linear(x, members[0], "group") + 1
        return torch.cat([first, packed_linear(x, members[1], "group"), packed_linear(first[..., :48] * 2, alone)], -1)

    check(work, lambda: x.mul_(-3))
    names = [type(each).__name__ for each in instructions_of(lambda: x.copy_(work()[..., :96]))]
    assert names.count("Packed") == 2


def test_what_changed_between_products_of_a_group_is_multiplied_anew():
    members, x = [packed(rows, 96, "nuq-4", "group") for rows in (40, 64)], torch.randn(1, 96)
    start = x.clone()

    def work() -> torch.Tensor:
        work = start + 0
        first = packed_linear(work, members[0], "group")
        return torch.cat([first, packed_linear(work.mul_(2), members[1], "group")], -1)

    check(work)


@pytest.mark.parametrize("spec", ["nuq-3", "tcq-2-L12", "vq-2", "tcq2-2-L12"])
def test_rows_of_a_packed_matrix(spec):
    """Rotated back in float32, in another order: u sqrt(n) for as many additions as the rotation has."""
    table, ids = packed(100, 96, spec, "embedding"), torch.tensor([[0, 7, 99], [8, 63, 64]])
    result = torch.zeros(2, 3, 96)
    instructions = instructions_of(lambda: result.copy_(packed_rows(ids, table)))
    assert not any(isinstance(each, Called) for each in instructions)
    program = Program(instructions)
    for _ in range(2):
        program.replay()
        assert error(result, packed_rows(ids, table).double()) <= 2 * float32_error(96)
        ids.copy_(torch.tensor([[16, 15, 50], [98, 1, 31]]))
    ids.fill_(100)
    with pytest.raises(IndexError):
        program.replay()


def test_a_matrix_in_another_layout_is_multiplied_by_torch():
    plain, x = packed(40, 64, "nuq-4", "x", laid_out=False), torch.randn(1, 64)
    check(lambda: packed_linear(x, plain), lambda: x.neg_(), native=False)
    assert parse_spec(plain.spec).decoder is not None


# --- records -----------------------------------------------------------------------------------------------------


def test_torch_is_called_for_what_has_no_kernel():
    x = torch.randn(5, 6)
    program = check(lambda: (x * 2).cumsum(0).exp() + x.sort(1)[0], lambda: x.neg_(), units=UNITS, native=False)
    assert len(program.parts) > 2


def test_random_numbers_are_drawn_anew_and_are_those_that_torch_draws():
    x, result = torch.zeros(40), torch.zeros(40)

    def work() -> None:
        result.copy_(torch.empty_like(x).exponential_(1) + x)

    before = torch.get_rng_state()
    program = Program(instructions_of(work))
    assert torch.equal(torch.get_rng_state(), before)
    found = []
    for run in (program.replay, program.replay):
        run()
        found.append(result.clone())
    torch.set_rng_state(before)
    for each in found:
        work()
        assert torch.equal(result, each)


def test_a_record_leaves_memory_as_it_was():
    cache, length = torch.zeros(4, 3), torch.tensor(1)

    def work() -> None:
        cache.index_copy_(0, length[None], torch.ones(1, 3))
        length.add_(1)

    program = Program(instructions_of(work))
    assert not cache.any()
    assert length == 1
    program.replay()
    program.replay()
    assert length == 3
    assert torch.equal(cache.sum(1), torch.tensor([0.0, 3.0, 3.0, 0.0]))


def test_memory_that_is_changed_on_the_way():
    """In place, by views, and what was read before keeps its value."""
    x = torch.randn(4, 6)

    def work() -> torch.Tensor:
        y = x + 1
        before = y * 3
        y[:, 2:4].mul_(-2)
        y[1] = 7
        z = torch.zeros(4, 6)
        z[:, :3] += y[:, 3:]
        y[2:].copy_(y[:2])
        again = y * 3
        return before + y + z + again

    check(work, lambda: x.neg_(), native=False)


def test_what_layers_make_of_the_same_is_computed_once():
    """Also of numbers that each makes anew, as the mask of each layer's attention is."""
    hidden, mask = torch.rand(2, 50) > 0.5, torch.zeros(6, 2, 50)

    def work() -> None:
        for layer in range(6):
            shown, less = torch.scalar_tensor(0.0), torch.full((), -torch.inf)
            mask[layer].copy_(torch.where(hidden, less, shown))

    instructions = instructions_of(work)
    assert len(instructions) == 1 + 6
    Program(instructions).replay()
    assert torch.equal(mask, torch.where(hidden, -torch.inf, 0.0).expand(6, 2, 50))


def test_what_does_not_change_is_computed_once():
    x, result = torch.randn(3, 8), torch.zeros(3, 8)

    def work() -> None:
        unused = x.exp()
        steps = torch.arange(8) * 2.0
        assert unused is not None
        result.copy_((x + steps).cos() * (x + steps).cos() + torch.ones_like(x))

    instructions = instructions_of(work)
    assert len(instructions) == 5  # x + steps, its cosine, the square, the sum, the copy
    program = Program(instructions)
    x.mul_(3)
    program.replay()
    found = result.clone()
    work()
    assert torch.allclose(found, result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: int(x.argmax()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.resize_(3),
    ],
)
def test_work_that_depends_on_values_is_refused(read):
    x = torch.randn(8)
    with pytest.raises(UnsupportedError):
        instructions_of(lambda: read(x * 2))


def test_a_program_of_many_operations_uses_little_memory():
    """As much as is alive at a time, not as much as is ever made."""
    x, result = torch.randn(1000), torch.zeros(1000)

    def work() -> None:
        y = x
        for _ in range(100):
            y = y * 1.01 + x
        result.copy_(y)

    program = Program(instructions_of(work))
    assert program.bytes <= 4 * 1000 * 4
    program.replay()
    found = result.clone()
    work()
    assert torch.equal(found, result)


def test_random_chains():
    """Of views, operations in and out of place, on memory that programs lay out anew."""
    random = torch.Generator().manual_seed(0)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=random))

    for _ in range(40):
        inputs = [torch.randn(4, 6), torch.randn(6, 4), torch.randn(4, 1)]
        plan = [[pick(1 << 20) for _ in range(4)] for _ in range(12)]

        def work(inputs: list[torch.Tensor] = inputs, plan: list[list[int]] = plan) -> torch.Tensor:
            known = [inputs[0] * 1, inputs[1].T + 0, inputs[2].expand(4, 6) - 1]
            for kind, first, second, third in plan:
                x, y = known[first % len(known)], known[second % len(known)]
                match kind % 8:
                    case 0:
                        known.append(x + y)
                    case 1:
                        known.append((x * y).clamp(-3, 3))
                    case 2:
                        known.append(torch.cat([x[:, third % 5 :], y[:, : third % 5]], 1))
                    case 3:
                        x[third % 4].add_(y[second % 4])
                    case 4:
                        x[:, 1:4].mul_(0.5)
                    case 5:
                        known.append(x.index_select(0, torch.tensor([3, 0, 2, 1])))
                    case 6:
                        known.append(x.reshape(6, 4).T)
                    case 7:
                        known.append(torch.where(x > y, x, y.flip(0)))
            return sum(known, torch.zeros(4, 6))

        check(work, lambda: [each.neg_() for each in inputs], native=False)  # noqa: B023 - runs here
