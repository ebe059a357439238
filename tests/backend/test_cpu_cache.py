"""A cache of codes by the CPU's kernels against the definition, `kvcache.Stream`: bytes, numbers, attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from tests.tolerance import float32_error
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

from qpalette.backends.cpu.jit import name_of
from qpalette.backends.cpu.step import Program, ahead, instructions_of, kernels_of
from qpalette.backends.cpu.step.program import Called
from qpalette.core.errors import InputError
from qpalette.kvcache import (
    PAGE,
    Exact,
    KeyMoments,
    Stream,
    Transform,
    VectorFormat,
    cache_palette,
    key_transforms,
    parse_cache,
    parse_code,
    shaped,
    white,
)
from qpalette.kvcache.shaping import BLOCK
from qpalette.kvcache.vectors import scales_of, unpack
from qpalette.nn.coded_states import CodedPair, CodedStates
from qpalette.runtime import select

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
ALL = [code.name for code in cache_palette()]
BATCH, HEADS, LENGTH = 2, 3, 300
NONE = Exact(0, 0)
# Of each family, one with every plane that its indexes lie in, odd numbers of units, less than a vector's lanes, more.
READ = [("nuq-4", 64), ("nuq-7", 20), ("vq-2.5", 40), ("vq-3", 64), ("vq4-1.25", 8), ("vq4-2", 72)]


@cache
def transform_of(kind: str, dim: int, distortion: float) -> Transform:
    if kind == "white":
        return white(dim)
    generator = torch.Generator().manual_seed(1)
    moments = []
    for _ in range(2):
        x = torch.randn(HEADS, 4 * dim, dim, generator=generator) @ torch.randn(HEADS, dim, dim, generator=generator)
        moments.append(x.mT @ x / (4 * dim))
    return shaped(torch.randn(HEADS, dim, generator=generator), *moments, distortion)


def pair(
    name: str, dim: int, kind: str = "white", exact: Exact = NONE, unbiased: bool = True, length: int = LENGTH
) -> tuple[Stream, Stream]:
    """The definition, and the CPU's."""
    code = parse_code(name)
    own = select("cache", name, CPU).stream
    assert own is not Stream
    given = (VectorFormat(code, dim, unbiased), transform_of(kind, dim, code.distortion), exact)
    shape, dtype = (BATCH, HEADS, length), torch.float32
    return Stream(*given, shape, dtype, CPU), own(*given, shape, dtype, CPU)


def vectors(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, HEADS, count, dim, generator=torch.Generator().manual_seed(seed)) * 3


def write(stream: Stream, x: Tensor, start: int = 0, starts: tuple[int, ...] = (0, 0)) -> None:
    stream.write(x, torch.arange(start, start + x.shape[2]), torch.tensor(starts))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_definition(name, unbiased):
    """Whole numbers and a Hadamard matrix of order 4^n leave nothing to rounding before a unit is compared: all sums
    are exact. Then there is no two ways, but for a scale within rounding of the middle between two bytes."""
    plain, mine = pair(name, 64, unbiased=unbiased)
    x = vectors(100, 64).round()
    x[0, 0, 3], x[1, 2, 70] = 0, torch.inf
    x[0, 1, 5, 6], x[1, 1, 99, 63] = torch.nan, -torch.inf
    for stream in (plain, mine):
        write(stream, x[:, :, :99])
        write(stream, x[:, :, 99:], 99)
    assert torch.equal(plain.codes, mine.codes)
    assert torch.equal(plain.scales, mine.scales)
    assert plain.scales[0, 0, 0, 3] == 0


@pytest.mark.parametrize(("name", "odd"), [("nuq-3", 17), ("nuq-7", 5), ("vq-2.5", 10), ("vq4-2", 12), ("vq4-1.75", 4)])
@pytest.mark.parametrize(("kind", "dim"), [("white", None), ("shaped", 24), ("shaped", 64)])
def test_another_byte_is_as_near(name, odd, kind, dim):
    """Where coordinates are rounded in another order, an index may be its neighbour: then both are equally near to what
    is coded, within the rounding of a product of `dim` terms, which moves a unit by that much and a difference of two
    squared distances by 2 |p - q| times it. Errors of a vector whose index differs are fed back: from there on it is
    another vector, and not compared."""
    dim = dim or odd
    plain, mine = pair(name, dim, kind)
    x = vectors(200, dim)
    for stream in (plain, mine):
        write(stream, x)
    code, points = plain.format.code, plain.points.double()
    bits, units = code.index_bits, plain.format.units
    wanted, found = (unpack(each.codes, bits, units).long() for each in (plain, mine))
    differ = (wanted != found).any(-1).flatten(2)[:, :, :200]
    assert differ.float().mean() < 0.01
    transform = plain.transform
    y = (x.double() - transform.mean[:, None].double()) @ transform.matrix.mT.double()
    error = 4 * float32_error(dim) * y.norm(dim=-1)
    for batch, head, token in differ.nonzero().tolist():
        page, place = divmod(token, PAGE)
        scale = scales_of(plain.scales[batch, head, page, place]).double() if kind == "shaped" else 1.0
        vector = y[batch, head, token]
        divisor = scale if kind == "shaped" else vector.square().mean().sqrt()
        first = int((wanted != found)[batch, head, page, place].nonzero()[0])
        target = vector.clone()
        if transform.feedback is not None:
            levels = points[wanted[batch, head, page, place]].flatten() * scale
            block = first * code.width // BLOCK * BLOCK
            target[block:] += transform.feedback[head, block:, :block].double() @ (vector - levels)[:block]
        unit = target[first * code.width : (first + 1) * code.width] / divisor
        one, other = (points[int(each[batch, head, page, place, first])] for each in (wanted, found))
        apart = (unit - one).square().sum() - (unit - other).square().sum()
        assert abs(float(apart)) <= 2 * float((one - other).norm() * error[batch, head, token] / divisor)
    same = ~differ
    scales = [each.scales.flatten(2)[:, :, :200][same].int() for each in (plain, mine)]
    assert (scales[0] - scales[1]).abs().max() <= 1
    assert (scales[0] != scales[1]).float().mean() < 0.01


@pytest.mark.parametrize("exact", [Exact(0, 0), Exact(4, 0), Exact(0, 5), Exact(3, 200)])
@pytest.mark.parametrize("starts", [(0, 0), (3, 70)])
@pytest.mark.parametrize("step", [1, 13, 130])
def test_sequences_of_calls_leave_the_same_memory(exact, starts, step):
    """Prompts whole and in parts, over the borders of pages, cut back, chosen anew, copied."""
    plain, mine = pair("nuq-4", 16, exact=exact)
    others = pair("nuq-4", 16, exact=exact, length=140)
    x = vectors(130, 16).round()
    for stream, other in zip((plain, mine), others, strict=True):
        for first in range(0, 130, step):
            write(stream, x[:, :, first : first + step], first, starts)
        stream.cut(90)
        stream.select(torch.tensor([1, 0]))
        other.copy(stream, 80)
        for each in (stream, other):
            write(each, x[:, :, :7], 80, starts)
    for one, two in ((plain, mine), others):
        assert all(torch.equal(a, b) for a, b in zip(one.memory, two.memory, strict=True))
        count, begins = torch.tensor(87), torch.tensor(starts)
        wanted, found = (each.read(count, begins) for each in (one, two))
        torch.testing.assert_close(found[:, :, :87], wanted[:, :, :87])
        assert found.shape == wanted.shape


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dim"), READ)
def test_numbers_are_those_of_the_bytes(name, dim):
    _, mine = pair(name, dim)
    write(mine, vectors(150, dim))
    read = mine.read(torch.tensor(150), torch.tensor([0, 0]))
    coordinates = mine.format.decode(mine.codes, mine.scales, mine.points).flatten(2, 3)[:, :, :150]
    exact = coordinates.double() @ mine.transform.inverse.mT.double()
    assert (read[:, :, :150] - exact).norm() <= float32_error(dim) * exact.norm()
    assert not read[:, :, 150:].any()
    mine.transform = Transform(torch.eye(dim)[None], torch.eye(dim)[None], torch.zeros(1, dim))
    mine._constants = mine._turned()
    assert torch.equal(mine.read(torch.tensor(150), torch.tensor([0, 0]))[:, :, :150], coordinates)


def masks(count: int) -> dict[str, Tensor]:
    place = torch.arange(LENGTH)
    seen = (place < count)[None, None, None].repeat(BATCH, 1, 1, 1)
    padded = seen.clone()
    padded[1, :, :, :70] = False
    window = (seen & (place > count - 20)).expand(-1, HEADS, 4, -1).clone()
    window[0, 1, 2] = False  # a query that sees nothing
    return {"all": seen, "padded": padded, "window": window}


def attended(keys: Stream, values: Stream, query: Tensor, mask: Tensor, count: int, starts: Tensor) -> Tensor:
    """In float64, of what is stored."""
    numbers = []
    for stream in (keys, values):
        plain = Stream(stream.format, stream.transform, stream.exact, (BATCH, HEADS, LENGTH), torch.float32, CPU)
        for mine, theirs in zip(plain.memory, stream.memory, strict=True):
            mine.copy_(theirs)
        numbers.append(plain.read(torch.tensor(count), starts).double())
    k, v = numbers
    scores = (query.double() @ k.mT * 0.3).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("exact", [Exact(0, 0), Exact(4, 9)])
@pytest.mark.parametrize("count", [1, 64, 65, 257])
@pytest.mark.parametrize("masked", ["all", "padded", "window"])
def test_attention_over_codes(exact, count, masked):
    check_attention("vq-3", "nuq-4", 24, 16, exact, count, masked)


@pytest.mark.parametrize(("name", "dim"), READ)
def test_attention_over_every_family(name, dim):
    check_attention(name, name, dim, dim, Exact(2, 3), 140, "padded")


def check_attention(
    of_keys: str, of_values: str, key_dim: int, value_dim: int, exact: Exact, count: int, masked: str
) -> None:
    """Scores of size s are off by the rounding of `key_dim` terms, and of as many to transform the query, each: that is
    relative for their weights; the sum has as many terms as tokens, and a transform."""
    kind = "shaped" if key_dim % BLOCK == 0 else "white"
    keys = pair(of_keys, key_dim, kind, exact)[1]
    values = pair(of_values, value_dim, "white", exact, False)[1]
    starts, mask = torch.tensor([0, 70 if masked == "padded" else 0]), masks(count)[masked]
    for stream, dim in ((keys, key_dim), (values, value_dim)):
        write(stream, vectors(count, dim, dim), 0, tuple(starts.tolist()))
    query = vectors(4, key_dim, 9) / 9
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    found = keys.attend(values, query, mask, torch.tensor(count), starts, 0.3)
    wanted = attended(keys, values, query, mask, count, starts)
    largest = 0.3 * query.norm(dim=-1).max() * keys.read(torch.tensor(count), starts).norm(dim=-1).max()
    terms = 2 * key_dim * float(largest) ** 2 + count + 2 * value_dim + 8
    assert found is not None
    assert found.shape == (*query.shape[:3], value_dim)
    assert (found - wanted).norm() <= float32_error(round(terms)) * wanted.norm()
    bias = torch.where(mask, 0.0, -torch.inf)
    assert torch.equal(keys.attend(values, query, bias, torch.tensor(count), starts, 0.3), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_rounded_once(dtype):
    own, code = select("cache", "nuq-4", CPU).stream, parse_code("nuq-4")
    streams = {
        each: own(VectorFormat(code, 32, True), white(32), Exact(2, 2), (BATCH, HEADS, LENGTH), each, CPU)
        for each in (dtype, torch.float32)
    }
    x, query = vectors(70, 32).to(dtype), vectors(3, 32, 1).to(dtype) / 9
    found = {}
    for each, stream in streams.items():
        write(stream, x.to(each))
        given = (masks(70)["all"], torch.tensor(70), torch.tensor([0, 0]), 0.3)
        found[each] = stream.attend(stream, query.to(each), *given)
    assert torch.equal(streams[dtype].pages, streams[torch.float32].pages)
    assert torch.equal(found[dtype], found[torch.float32].to(dtype))


@pytest.mark.parametrize("name", ["nuq-4", "vq-3", "vq4-2"])
def test_the_same_bits_with_any_number_of_threads(name):
    x, y, query = vectors(290, 64), vectors(290, 64, 1), vectors(3, 64, 2) / 9
    found = []
    for count in (1, 2):
        with threads(count):
            keys, values = pair(name, 64, "shaped", Exact(2, 2))[1], pair(name, 64, "white", Exact(2, 2))[1]
            for stream, each in ((keys, x), (values, y)):
                write(stream, each)
            given = (torch.tensor(290), torch.tensor([0, 0]))
            result = keys.attend(values, query, masks(290)["all"], *given, 0.3)
            found.append([*keys.memory, *values.memory, keys.read(*given), result])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


# --- programs ----------------------------------------------------------------------------------------------------


def test_a_step_is_a_program_and_the_same_bits():
    """Token after token, over the border of a page, until there is no room."""
    exact, starts, length = Exact(2, 3), torch.tensor([0, 3]), torch.tensor(60)
    shapes = (("vq-3", 24, "shaped"), ("nuq-4", 16, "white"))
    streams = [[pair(*shape, exact, length=70)[1] for shape in shapes] for _ in range(2)]
    token, place = torch.zeros(BATCH, HEADS, 1, 24), torch.arange(70)
    results = [torch.zeros(BATCH, HEADS, 2, 16) for _ in streams]

    def step(mine: int, count: Tensor) -> None:
        keys, values = streams[mine]
        keys.write(token, count[None], starts)
        values.write(token[..., :16], count[None], starts)
        count.add_(1)
        query = token.expand(-1, -1, 2, -1) / 9
        mask = (place < count)[None, None, None]
        found = keys.attend(values, query, mask, count, starts, 0.3)
        assert found is not None
        results[mine].copy_(found)

    for keys, values in streams:
        write(keys, vectors(60, 24), 0, (0, 3))
        write(values, vectors(60, 16), 0, (0, 3))
    instructions = instructions_of(lambda: step(0, length))
    assert int(length) == 60
    assert not [each for each in instructions if isinstance(each, Called)]
    assert {name_of(kernel) for kernel in kernels_of(instructions)} <= ahead.every_kernel().keys()
    program, count = Program(instructions), length.clone()
    for seed in range(10):
        token.copy_(vectors(1, 24, seed))
        program.replay()
        step(1, count)
        assert torch.equal(*results)
    for pages in zip(*streams, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pages[0].memory, pages[1].memory, strict=True))
    before = streams[0][0].pages.clone()
    with pytest.raises(IndexError):
        program.replay()
    with pytest.raises(InputError, match="room for 70 tokens, not for 71"):
        step(1, count)
    assert torch.equal(streams[0][0].pages, before)


# --- states that are codes ---------------------------------------------------------------------------------------


@pytest.fixture
def states() -> tuple[CodedStates, CodedStates]:
    keys, values = pair("nuq-4", 16)[1], pair("nuq-4", 16, unbiased=False)[1]
    for seed, stream in enumerate((keys, values)):
        write(stream, vectors(100, 16, seed))
    return CodedStates.of(CodedPair(keys, values, torch.tensor(100), torch.tensor([0, 0])))


def test_whatever_looks_at_coded_states_sees_numbers(states):
    key, value = states
    numbers = key.decoded()
    assert key.shape == numbers.shape == (BATCH, HEADS, LENGTH, 16)
    assert (key.dtype, key.device, key.ndim, key.size(2)) == (numbers.dtype, numbers.device, 4, LENGTH)
    for function in (
        lambda x: x + 0,
        lambda x: x[:, :, 3],
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, -1, LENGTH, 16),
        lambda x: torch.cat([x, x]),
        lambda x: x.to(torch.float64),
        lambda x: torch.ones(BATCH, HEADS, 1, 16) @ x.mT,
        lambda x: x.clone(),
    ):
        found = function(key)
        assert type(found) is Tensor
        assert torch.equal(found, function(numbers))
    attend, query = torch.nn.functional.scaled_dot_product_attention, vectors(2, 16) / 9
    plain = (numbers, value.decoded())
    for options in ({"attn_mask": masks(100)["padded"]}, {}, {"is_causal": True}):
        wanted = attend(query, *plain, **options)
        torch.testing.assert_close(attend(query, *states, **options), wanted)
    wanted = attend(query.double(), *(each.double() for each in plain), attn_mask=masks(100)["all"])
    torch.testing.assert_close(
        attend(query.double(), *(each.to(torch.float64) for each in states), attn_mask=masks(100)["all"]), wanted
    )


def test_heads_that_are_repeated_stay_codes(states):
    """As transformers does ahead of torch's attention; and numbers, where something else follows."""
    repeated = [repeat_kv(each, 3) for each in states]
    spread = states[0][:, :, None, :, :]
    assert [type(each) for each in (*repeated, spread)] == [CodedStates] * 3
    assert torch.equal(repeated[0] + 0, repeat_kv(states[0].decoded(), 3))
    assert torch.equal(spread + 0, states[0].decoded()[:, :, None])
    assert type(spread.expand(-1, -1, 2, -1, -1)) is type(spread.transpose(1, 2)) is Tensor
    assert repeated[0].shape == repeat_kv(states[0].decoded(), 3).shape
    query = vectors(1, 16).repeat_interleave(3, 1) / 9
    query *= torch.linspace(1, 2, query.numel()).reshape(query.shape)
    attend, plain = torch.nn.functional.scaled_dot_product_attention, [each.decoded() for each in repeated]
    with reads_of(states) as read:
        for mask in (masks(100)["padded"], masks(100)["all"]):
            found = attend(query, *repeated, attn_mask=mask)
            torch.testing.assert_close(found, attend(query, *plain, attn_mask=mask))
    assert not read
    heads = masks(100)["all"].repeat(1, query.shape[1], 1, 1)
    torch.testing.assert_close(attend(query, *repeated, attn_mask=heads), attend(query, *plain, attn_mask=heads))


@contextmanager
def reads_of(states: tuple[CodedStates, CodedStates]) -> Iterator[list[Stream]]:
    """Which streams are decoded meanwhile."""
    seen: list[Stream] = []
    with pytest.MonkeyPatch.context() as patch:
        kind = type(states[0].stream)
        patch.setattr(kind, "read", lambda self, *given: (seen.append(self), Stream.read(self, *given))[1])
        yield seen


def test_gradients_reach_queries_of_coded_states(states):
    query, mask = (vectors(2, 16) / 9).requires_grad_(), masks(100)["all"]
    attend = torch.nn.functional.scaled_dot_product_attention
    found = torch.autograd.grad(attend(query, *states, attn_mask=mask).square().sum(), query)
    plain = (states[0].decoded(), states[1].decoded())
    wanted = torch.autograd.grad(attend(query, *plain, attn_mask=mask).square().sum(), query)
    torch.testing.assert_close(found, wanted)
    assert wanted[0].any()


@pytest.mark.parametrize("spec", ["vq-3", "balanced:vq-3", "mean:vq-3"])
def test_transforms_are_in_memory_once(spec):
    """A stream reads those that it is given, in their memory."""
    plan, dim = parse_cache(spec), 64
    x = torch.randn(HEADS, 4 * dim, dim)
    moments = [KeyMoments(x.mean(1), x.mT @ x, x.mT @ x)] * 2
    exact, shape = Exact(), (BATCH, HEADS, LENGTH)
    for given in key_transforms(plan, moments):
        format = VectorFormat(parse_code("vq-3"), dim, True)
        stream = select("cache", "vq-3", CPU).stream(format, given, exact, shape, torch.float32, CPU)
        own = {each.data_ptr() for each in (given.matrix, given.inverse, given.mean, *(given.shaping or ()))}
        _, constants, _, _ = stream._parts
        matrices = [each for each in constants if each.shape[0] == HEADS]
        assert len(matrices) == len(own)
        assert {each.data_ptr() for each in matrices} == own
