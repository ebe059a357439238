"""Prepared products on the processor: the same bits alone, in company, from any thread, and of the present values."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from qpalette.backends.cpu import product
from qpalette.backends.cpu.operands import TYPES, read_values, write_values
from qpalette.codes import parse_spec
from qpalette.core.records import LinearRecord
from qpalette.nn import QuantLinear
from qpalette.rotate import diagonal_of, rotation_for
from qpalette.runtime import PackedLinear, PreparedLinears, backends, packed_linear, packed_linears

CPU = backends()["cpu"]
# Spec and rows of each member: of one way of decoding, and of several. 576 rows of 576 are cut into two pieces.
GROUPS = {
    "one way": [("nuq-4", 576), ("nuq-2", 40), ("nuq-5", 192)],
    "float32 alone": [("nuq-6", 576), ("nuq-8", 40), ("nuq-5", 192)],  # whatever the type of the input
    "tall": [("nuq-6", 700)],
    "several": [("nuq-4", 100), ("tcq-2-L12", 576), ("nuq-3", 64), ("tcq-4-L12", 16)],
}
INPUTS = [576, 90]


def random_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_group(name: str, inputs: int, diagonal: str = "signs") -> list[PackedLinear]:
    random = random_generator(1)
    signs = torch.randint(0, 256, (-(-inputs // 8),), generator=random, dtype=torch.uint8)
    values = torch.randn(inputs, generator=random).half().view(torch.int16)
    members = []
    for spec, rows in GROUPS[name]:
        shape = (-(-rows // 16), -(-inputs // 16), parse_spec(spec).words_per_tile)
        members.append(
            PackedLinear(
                codes=CPU.to_layout(torch.randint(-(2**31), 2**31, shape, generator=random, dtype=torch.int32), spec),
                scales=(torch.rand(rows, generator=random) + 0.5).half().view(torch.int16),
                diagonal=signs if diagonal == "signs" else values,
                spec=spec,
                rotation=rotation_for(inputs, "full").name,
                out_features=rows,
                in_features=inputs,
                layout=CPU.layout,
            )
        )
    return members


def random_vectors(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=random_generator(2)).to(dtype)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [(0,), (1,), (2, 5), (16,), (17,)])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", ["one way", "several"])
def test_a_matrix_has_the_same_results_in_any_company(
    name: str, inputs: int, batch: tuple[int, ...], threads: int
) -> None:
    members = random_group(name, inputs)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = random_vectors(*batch, inputs, dtype=dtype)
        alone = [packed_linear(x, member) for member in members]
        for found in (PreparedLinears(members)(x), packed_linears(x, members).split([y.shape[-1] for y in alone], -1)):
            assert [y.dtype for y in found] == [dtype] * len(members)
            assert all(map(torch.equal, found, alone))
    assert all(y.is_contiguous() for y in PreparedLinears(members)(x))


@pytest.mark.parametrize("diagonal", ["signs", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_type_costs_one_rounding(dtype: torch.dtype, diagonal: str) -> None:
    product = PreparedLinears(random_group("float32 alone", 576, diagonal))
    x = random_vectors(3, 576, dtype=dtype)
    assert all(torch.equal(y, z.to(dtype)) for y, z in zip(product(x), product(x.float()), strict=True))


def test_a_float16_diagonal_multiplies_the_input() -> None:
    members, x = random_group("one way", 576, "float16"), random_vectors(3, 576)
    without = [member.with_(diagonal=torch.zeros(72, dtype=torch.uint8)) for member in members]
    multiplied = x * diagonal_of(members[0].diagonal, 576)
    # The rotation's factor of 1/4 is a power of two: the same roundings whatever it comes after.
    assert all(map(torch.equal, PreparedLinears(members)(x), PreparedLinears(without)(multiplied)))


def test_inputs_of_any_strides() -> None:
    product, x = PreparedLinears(random_group("one way", 576)), random_vectors(4, 576)
    for view in (x.T.contiguous().T, random_vectors(4, 1152)[:, ::2], x[:1].expand(3, -1), x[1:]):
        assert all(map(torch.equal, product(view), product(view.clone(memory_format=torch.contiguous_format))))


def test_an_input_that_is_the_negative_of_its_memory() -> None:
    x = random_vectors(2, 576)
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()
    product = PreparedLinears(random_group("one way", 576))
    assert all(map(torch.equal, product(negative.contiguous()), product(-x)))
    assert all(map(torch.equal, product(negative), product(-x)))


def written(tensor: torch.Tensor, values: torch.Tensor) -> None:
    tensor.copy_(values)


def put_in_place(tensor: torch.Tensor, values: torch.Tensor) -> None:
    tensor.data = values.clone()


@pytest.mark.parametrize("change", [written, put_in_place])
@pytest.mark.parametrize("field", ["codes", "scales", "diagonal"])
@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_changes_are_seen(field: str, change: Callable[..., None], batch: int, dtype: torch.dtype) -> None:
    members = random_group("several", 90)
    product, x = PreparedLinears(members), random_vectors(batch, 90, dtype=dtype)
    before = product(x)
    for tensor in {id(tensor): tensor for tensor in (getattr(member, field) for member in members)}.values():
        change(tensor, tensor.roll(1))
    expected = PreparedLinears([member.with_(codes=member.codes.clone()) for member in members])(x)
    found = product(x)
    assert all(map(torch.equal, found, expected))
    assert not any(map(torch.equal, found, before))


def test_threads_share_a_product() -> None:
    product = PreparedLinears(random_group("several", 576))
    inputs = [random_vectors(1 + i % 3, 576) + i for i in range(8)]
    expected, wrong = [product(x) for x in inputs], []

    def work(index: int) -> None:
        for _ in range(30):
            if not all(map(torch.equal, product(inputs[index]), expected[index])):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_prepare_their_own(copied: Callable[[QuantLinear], QuantLinear]) -> None:
    layer = QuantLinear(LinearRecord("nuq-4", 40, 90, rotation_for(90, "full").name, 0))
    layer.qp_codes.random_(-(2**31), 2**31, generator=random_generator(0))
    layer.qp_scales.copy_(torch.ones(40).half().view(torch.int16))
    layer.prepare()
    x = random_vectors(1, 90)
    expected, twin = layer(x), copied(layer)
    assert torch.equal(twin(x), expected)
    layer.qp_codes.zero_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(layer(x), expected)


def test_codes_as_stored_are_laid_out_for_the_moment() -> None:
    members, x = random_group("one way", 90), random_vectors(1, 90)
    stored = []
    for member in members:
        shape = (-(-member.out_features // 16), 6, parse_spec(member.spec).words_per_tile)
        codes = CPU.from_layout(member.codes, member.spec, shape)
        stored.append(dataclasses.replace(member, codes=codes, layout="tiles"))
    assert all(map(torch.equal, CPU.product(stored)(x), PreparedLinears(members)(x)))


HALVES = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_type_is_read_and_written(dtype: torch.dtype) -> None:
    values = torch.from_numpy(HALVES.view(np.int16)).view(dtype)
    wide = np.empty(len(HALVES), np.float32)
    read_values(values.data_ptr(), TYPES[dtype], wide)
    assert torch.equal(torch.from_numpy(wide).nan_to_num(7), values.float().nan_to_num(7))
    back = torch.empty_like(values)
    write_values(wide, TYPES[dtype], back.data_ptr())
    assert torch.equal(back.isnan(), values.isnan())
    assert torch.equal(back.view(torch.int16)[~back.isnan()], values.view(torch.int16)[~back.isnan()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """Any bits of float32, the points halfway between two values, and their neighbours."""
    anything = torch.randint(-(2**31), 2**31, (100_000,), generator=random_generator(3)).int().view(torch.float32)
    halves = torch.from_numpy(HALVES.view(np.int16))
    middles = ((halves.view(torch.float16).double() + (halves + 1).view(torch.float16).double()) / 2).float()
    middles = torch.cat([middles, ((halves.int() << 16) + (1 << 15)).view(torch.float32)])
    near = torch.cat([(middles.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)])
    wide = torch.cat([anything, near])
    found = torch.empty_like(wide, dtype=dtype)
    write_values(wide.numpy(), TYPES[dtype], found.data_ptr())
    expected = wide.to(dtype)
    assert torch.equal(found.isnan(), wide.isnan())
    assert torch.equal(found[~found.isnan()], expected[~found.isnan()])


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch had taken at once, over what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = found.profiler.kineto_results.events()
    taken = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in taken]).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tokens_take_some_rows_and_tokens_in_float32_at_a_time(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of matrices that are decoded for the vendor's product: beside x and results no whole one is in memory."""
    piece, strip, tokens, inputs, rows = 32, 1 << 14, 500, 90, 700
    (member,) = random_group("tall", inputs)
    x = random_vectors(tokens, inputs, dtype=dtype)
    whole = packed_linear(x, member)
    monkeypatch.setattr(product, "PIECE", piece)
    monkeypatch.setattr(product, "STRIP", strip)
    assert strip < inputs * rows / 3
    cut = packed_linear(x, member)
    kept = (tokens * (inputs + rows)) * dtype.itemsize  # the rotated input, and the results
    at_a_time = strip + piece * (4 * inputs + strip // inputs)  # numbers; a rotation makes its input anew a few times
    assert kept < peak_bytes(lambda: packed_linear(x, member)) < kept + 4 * at_a_time < kept + 4 * inputs * rows
    difference = (cut - whole).double().norm() / whole.double().norm()
    assert difference < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 4)
