"""A cache of codes by the GPU's kernels against the definition, `kvcache.Stream`: bytes, attention, generation.

Tolerance of attention. Coordinates of queries, entries of the tables and weights of the softmax are rounded to float16,
each by at most 2^-11 of itself, 2^-11 / sqrt(3) in the root mean square; sums are float32. Errors of the terms of a
score are independent: it is off by sqrt(2) times that of the root of the sum of the squares of its terms, in nats, and
so is its weight, relatively. Weights and values add two more roundings, the result one of its type, eps / sqrt(12).
Twice all of them together is allowed; operands in bfloat16 would have eight times as much.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tests.cache_transforms import transform_of
from tests.tolerance import float32_error
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qpalette.backends.cuda.graphs import capture_graph
from qpalette.generation import CodedTokenCache, attach
from qpalette.kvcache import (
    Exact,
    Stream,
    VectorFormat,
    cache_palette,
    parse_cache,
    parse_code,
)
from qpalette.nn.coded_cache import CodedCache
from qpalette.nn.coded_states import CodedPair, CodedStates
from qpalette.runtime import select

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
NONE = Exact(0, 0)
Pair = tuple[Stream, Stream]  # the definition, and the kernels


def pair(
    name: str,
    dim: int,
    shape: tuple[int, int, int],
    kind: str = "white",
    exact: Exact = NONE,
    unbiased: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Pair:
    code = parse_code(name)
    own = select("cache", name, DEVICE).stream
    assert own is not Stream
    given = (VectorFormat(code, dim, unbiased), transform_of(kind, shape[1], dim), exact)
    return Stream(*given, shape, dtype, DEVICE), own(*given, shape, dtype, DEVICE)


def vectors(batch: int, heads: int, count: int, dim: int, seed: int = 0) -> Tensor:
    x = torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(seed)) * 3
    return x.half().to(DEVICE)


def write(stream: Stream, x: Tensor, start: int = 0, starts: tuple[int, ...] = (0, 0)) -> None:
    begins = torch.tensor(starts, device=DEVICE)
    stream.write(x, torch.arange(start, start + x.shape[2], device=DEVICE), begins)


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", [code.name for code in cache_palette()])
def test_bytes_are_those_of_the_definition(name: str, unbiased: bool) -> None:
    """Whole numbers and a Hadamard matrix of order 4^n leave nothing to rounding before a unit is compared. A scale may
    be within rounding of the middle between two bytes."""
    plain, mine = pair(name, 64, (2, 3, 120), unbiased=unbiased)
    x = vectors(2, 3, 100, 64).round()
    x[0, 0, 3], x[1, 2, 70] = 0, torch.inf
    x[0, 1, 5, 6], x[1, 1, 99, 63] = torch.nan, -torch.inf
    for stream in (plain, mine):
        for first, last in pairwise((0, 1, 60, 99, 100)):
            write(stream, x[:, :, first:last], first)
    assert torch.equal(plain.codes, mine.codes)
    apart = (plain.scales.int() - mine.scales.int()).abs()
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 0.005
    assert mine.scales[0, 0, 0, 3] == mine.scales[1, 2, 1, 6] == mine.scales[0, 1, 0, 5] == 0
    assert plain.scales[0, 0, 0, 3] == 0


@pytest.mark.parametrize(("name", "dim"), [("nuq-3", 128), ("vq-2.5", 96), ("vq4-2", 128), ("vq4-1.75", 80)])
@pytest.mark.parametrize("step", [1, 40])
def test_keys_with_errors_fed_back_are_coded_as_well(name: str, dim: int, step: int) -> None:
    """Coordinates summed in another order change an index where two points are equally near, seldom, and what is fed
    back after it; not how much the errors cost, (e + L e)^2, in the mean."""
    plain, mine = pair(name, dim, (2, 3, 90), "fed back")
    x = vectors(2, 3, 80, dim)
    write(plain, x)
    for first in range(0, 80, step):
        write(mine, x[:, :, first : first + step], first)
    differ = (plain.codes != mine.codes).any(-1).flatten(2)[:, :, :80]
    assert differ.float().mean() <= 0.02
    y, feedback = plain.transform.apply(x), plain.transform.feedback
    assert feedback is not None
    costs = []
    for stream in (plain, mine):
        decoded = stream.format.decode(stream.codes, stream.scales, stream.points).flatten(2, 3)[:, :, :80]
        error = y - decoded
        costs.append((error + error @ feedback.mT).square().mean())
    assert float(costs[1]) == pytest.approx(float(costs[0]), rel=5e-3)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [1, 3, 17, 300, 1000])
@pytest.mark.parametrize("name", ["nuq-3", "nuq-8", "vq-2.5", "vq4-2"])
def test_any_number_of_tokens(name: str, count: int, batch: int) -> None:
    """From a place within a page, with exact tokens; vectors as a projection leaves them, heads side by side."""
    starts = tuple(30 * i for i in range(batch))
    plain, mine = pair(name, 64, (batch, 3, 1100), exact=Exact(4, 30))
    x = vectors(batch, count, 3, 64).round().transpose(1, 2)
    for stream in (plain, mine):
        write(stream, x, 37, starts)
    assert torch.equal(plain.codes, mine.codes)
    assert all(torch.equal(a, b) for a, b in zip(plain.memory[1:], mine.memory[1:], strict=True))
    assert (plain.scales.int() - mine.scales.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "dim"), [("nuq-3", 128), ("vq-2", 128), ("vq4-2", 64), ("nuq-4", 256)])
def test_what_a_token_becomes_depends_on_no_token_beside_it(name: str, dim: int, dtype: torch.dtype) -> None:
    shape = (1, 2, 300)
    alone, together = (pair(name, dim, shape, "fed back", dtype=dtype)[1] for _ in range(2))
    x = vectors(1, 2, 300, dim).to(dtype)
    write(together, x, 0, (0,))
    for first in range(0, 300, 30):
        write(alone, x[:, :, first : first + 30], first, (0,))
    assert torch.equal(alone.pages, together.pages)


@pytest.mark.parametrize("exact", [NONE, Exact(4, 0), Exact(0, 5), Exact(3, 200)], ids=str)
@pytest.mark.parametrize("starts", [(0, 0), (3, 70)])
@pytest.mark.parametrize("step", [1, 8, 130])
def test_sequences_of_calls_leave_the_same_memory(exact: Exact, starts: tuple[int, int], step: int) -> None:
    """Prompts whole and in parts, over the borders of pages, cut back, chosen anew, copied."""
    plain, mine = pair("nuq-4", 16, (2, 3, 300), exact=exact)
    others = pair("nuq-4", 16, (2, 3, 140), exact=exact)
    x = vectors(2, 3, 130, 16).round()
    for stream, other in zip((plain, mine), others, strict=True):
        for first in range(0, 130, step):
            write(stream, x[:, :, first : first + step], first, starts)
        stream.cut(90)
        stream.select(torch.tensor([1, 0], device=DEVICE))
        other.copy(stream, 80)
        for each in (stream, other):
            write(each, x[:, :, :7], 80, starts)
    for one, two in ((plain, mine), others):
        assert torch.equal(one.codes, two.codes)
        assert all(torch.equal(a, b) for a, b in zip(one.memory[1:], two.memory[1:], strict=True))
        assert (one.scales.int() - two.scales.int()).abs().max() <= 1


def test_what_has_no_room_is_left_out() -> None:
    _, mine = pair("vq-3", 64, (2, 3, 70))
    write(mine, vectors(2, 3, 70, 64))
    before = mine.pages.clone()
    write(mine, vectors(2, 3, 20, 64, 1), 70)
    write(mine, vectors(2, 3, 1, 64, 1), 70)
    assert torch.equal(mine.pages, before)


@pytest.mark.parametrize(("name", "dim"), [("nuq-7", 80), ("vq-2.5", 128), ("vq4-1.25", 64), ("vq4-2", 256)])
def test_numbers_are_those_of_the_bytes(name: str, dim: int) -> None:
    _, mine = pair(name, dim, (2, 3, 300))
    write(mine, vectors(2, 3, 150, dim))
    given = (torch.tensor(150, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE))
    found, wanted = mine.read(*given), Stream.read(mine, *given)
    assert found.shape == wanted.shape
    assert (found - wanted)[:, :, :150].norm() <= float32_error(2 * dim) * wanted[:, :, :150].norm()


# --- attention ----------------------------------------------------------------------------------------------------


def masks(batch: int, length: int, count: int, starts: tuple[int, ...]) -> dict[str, Tensor]:
    place = torch.arange(length, device=DEVICE)
    seen = (place < count)[None, None, None].repeat(batch, 1, 1, 1)
    padded = seen & (place >= torch.tensor(starts, device=DEVICE)[:, None, None, None])
    return {"one": seen[:1], "padded": padded, "window": padded & (place > count - 20)}


CASES = [  # codes of keys and values, their widths, (batch, key heads, queries of each), tokens, length
    ("nuq-3", "nuq-3", 128, 128, (1, 8, 4), 1000, 1024),
    ("vq-2.5", "vq-2.5", 128, 128, (2, 8, 4), 5000, 8192),
    ("vq4-2", "vq4-2", 128, 128, (1, 2, 7), 257, 300),
    ("nuq-4", "vq-3", 64, 64, (3, 3, 3), 2048, 2048),
    ("vq4-1.25", "vq-1.5", 80, 80, (2, 4, 1), 190, 256),
    ("vq-3.5", "nuq-2", 96, 64, (1, 4, 8), 700, 1000),
    ("nuq-7", "nuq-5", 128, 128, (1, 2, 4), 333, 400),
    ("vq-3", "vq-4", 256, 256, (1, 1, 8), 1500, 1537),
    ("vq-2", "nuq-4", 128, 128, (1, 1, 20), 65, 128),
    ("nuq-4", "nuq-4", 128, 128, (1, 8, 4), 32000, 32768),
]


@pytest.mark.parametrize("exact", [NONE, Exact(4, 0), Exact(4, 40)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_codes(case: tuple, exact: Exact) -> None:
    key_code, value_code, key_dim, value_dim, (batch, heads, rows), count, length = case
    starts = tuple(17 * i for i in range(batch))
    keys = pair(key_code, key_dim, (batch, heads, length), "fed back", exact)[1]
    values = pair(value_code, value_dim, (batch, heads, length), "white", exact, False)[1]
    for stream, dim in ((keys, key_dim), (values, value_dim)):
        write(stream, vectors(batch, heads, count, dim, dim), 0, starts)
    query = (vectors(batch, rows, heads, key_dim, 9) / (3 * key_dim**0.5)).transpose(1, 2)
    given = (torch.tensor(count, device=DEVICE), torch.tensor(starts, device=DEVICE))
    k, v = (Stream.read(stream, *given).double() for stream in (keys, values))
    y = keys.transform.apply(k.float())
    turned = query.float() @ keys.transform.inverse
    terms = (turned.square() @ y.square().mT).sqrt().max() * 0.6
    for mask in masks(batch, length, count, starts).values():
        scores = (query.double() @ k.mT * 0.6).masked_fill(~mask, -torch.inf)
        wanted = scores.softmax(-1) @ v
        found = keys.attend(values, query, mask, *given, 0.6)
        assert found is not None
        assert found.shape == wanted.shape
        bound = 2 * ((2 * float(terms) ** 2 + 2) * 2.0**-22 / 3 + 2.0**-20 / 12) ** 0.5
        assert (found.double() - wanted).norm() <= bound * wanted.norm()
        assert torch.equal(found, keys.attend(values, query, mask, *given, 0.6)), "the same bits on every run"


def test_a_sequence_that_sees_nothing_and_values_that_are_zero() -> None:
    keys, values = pair("vq-3", 64, (2, 3, 200))[1], pair("nuq-4", 64, (2, 3, 200), unbiased=False)[1]
    write(keys, vectors(2, 3, 150, 64))
    write(values, torch.zeros_like(vectors(2, 3, 150, 64)))
    given = (torch.tensor(150, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE))
    mask = masks(2, 200, 150, (0, 0))["padded"].clone()
    mask[1] = False
    found = keys.attend(values, vectors(2, 3, 4, 64, 1), mask, *given, 0.1)
    assert found is not None
    assert not found.any()


def test_bfloat16() -> None:
    streams = [
        pair("vq-3", 128, (1, 4, 600), "white", Exact(4, 9), unbiased, torch.bfloat16)[1] for unbiased in (True, False)
    ]
    for seed, stream in enumerate(streams):
        write(stream, vectors(1, 4, 500, 128, seed).bfloat16(), 0, (0,))
    given = (torch.tensor(500, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE))
    mask, query = masks(1, 600, 500, (0,))["one"], (vectors(1, 4, 4, 128, 9) / 30).bfloat16()
    k, v = (Stream.read(stream, *given).double() for stream in streams)
    wanted = (query.double() @ k.mT * 0.3).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    found = streams[0].attend(streams[1], query, mask, *given, 0.3)
    assert found is not None
    assert (found.double() - wanted).norm() <= 2 * 2.0**-7 / 12**0.5 * wanted.norm()


def test_what_kernels_do_not_do_is_read() -> None:
    keys, values = pair("nuq-4", 64, (1, 2, 100))[1], pair("nuq-4", 64, (1, 2, 100), unbiased=False)[1]
    for stream in (keys, values):
        write(stream, vectors(1, 2, 50, 64), 0, (0,))
    given = (torch.tensor(50, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE))
    states = CodedStates.of(CodedPair(keys, values, *given))
    query = vectors(1, 2, 3, 64, 1) / 9
    mask = (torch.arange(100, device=DEVICE) < torch.tensor([[48], [49], [50]], device=DEVICE))[None, None]
    assert keys.attend(values, query, mask, *given, 0.1) is None
    attend = torch.nn.functional.scaled_dot_product_attention
    plain = [each.decoded() for each in states]
    torch.testing.assert_close(attend(query, *states, attn_mask=mask), attend(query, *plain, attn_mask=mask))
    assert not pair("nuq-4", 64, (1, 2, 100), dtype=torch.float32)[1].is_fused


def test_one_graph_serves_every_length() -> None:
    keys = pair("nuq-3", 128, (1, 2, 300), "fed back", Exact(4, 3))[1]
    values = pair("vq-2.5", 128, (1, 2, 300), "white", Exact(4, 3), False)[1]
    alike = pair("nuq-3", 128, (1, 2, 300), "fed back", Exact(4, 3))[1]
    others = pair("vq-2.5", 128, (1, 2, 300), "white", Exact(4, 3), False)[1]
    count, starts = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    token, place = torch.zeros(1, 2, 1, 128, device=DEVICE).half(), torch.arange(300, device=DEVICE)
    result = torch.zeros(1, 2, 4, 128, device=DEVICE).half()

    def step(own_keys: Stream, own_values: Stream, out: Tensor) -> None:
        own_keys.write_both(own_values, token, token, count[None], starts)
        found = own_keys.attend(
            own_values, token.expand(-1, -1, 4, -1) / 9, (place <= count)[None, None, None], count + 1, starts, 0.3
        )
        assert found is not None
        out.copy_(found)

    step(keys, values, result)
    graph, eager = capture_graph(lambda: step(keys, values, result)), torch.zeros_like(result)
    for at in range(150):
        token.copy_(vectors(1, 2, 1, 128, at))
        count.fill_(at)
        graph.replay()
        step(alike, others, eager)
        assert torch.equal(result, eager)


# --- generation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["white:nuq-8,sinks=2", "white:vq-4,sinks=4,window=8", "white:vq4-2"])
@pytest.mark.parametrize("captured", [False, True])
def test_generation_is_that_of_the_definition(spec: str, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = torch.randint(3, 512, (1, 70), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    models = [LlamaForCausalLM(config).half().to(DEVICE).eval()]
    models.append(LlamaForCausalLM(config).half().to(DEVICE).eval())
    models[1].load_state_dict(models[0].state_dict())
    found = []
    for model, own in zip(models, (False, True), strict=True):
        if not own:
            monkeypatch.setattr(type(select("cache", "nuq-4", DEVICE)), "stream", Stream)
        model.set_attn_implementation("grouped")
        capture = capture_graph if captured and own else None
        attach(model, "never", capture, lambda c, length: CodedTokenCache(c, length, parse_cache(spec), None))
        found.append(model.generate(ids, max_new_tokens=24, do_sample=False)[0, 70:].tolist())
        monkeypatch.undo()
    same = sum(one == two for one, two in zip(*found, strict=True))
    print(spec, captured, found)
    assert found[0][:8] == found[1][:8], "logits lie far apart; later, one token may decide all others"
    assert same >= 8


def test_a_compiled_step_is_the_eager_one() -> None:
    """Both run the same kernels over codes; between them torch.compile rounds elsewhere."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.float16, attn_implementation="grouped").to(DEVICE).eval()
    caches = [CodedCache(config, parse_cache("white:nuq-4,window=8"), 100) for _ in range(2)]
    ids = torch.randint(3, 512, (2, 30), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
        for token in ids[:, :12].split(1, 1):
            compiled, eager = (
                step(token, past_key_values=caches[0]).logits,
                model(token, past_key_values=caches[1]).logits,
            )
            assert (compiled - eager).norm() <= 0.02 * eager.norm()
    differ = [
        (mine.codes != other.codes).float().mean()
        for one, two in zip(*(cache.layers for cache in caches), strict=True)
        for mine, other in zip(one.streams, two.streams, strict=True)
    ]
    assert max(differ) <= 0.05


@pytest.mark.parametrize("attention", ["sdpa", "grouped"])
def test_a_step_decodes_nothing(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this version of transformers does with the heads of keys ahead of torch's attention."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention).to(DEVICE).eval()
    cache, seen = CodedCache(config, parse_cache("white:nuq-3"), 100), []
    own = select("cache", "nuq-3", DEVICE).stream
    read = own.read
    monkeypatch.setattr(own, "read", lambda self, *given: (seen.append(self), read(self, *given))[1])
    with torch.no_grad():
        for count in (30, 1, 1):
            model(torch.zeros(1, count, dtype=torch.int64, device=DEVICE), past_key_values=cache)
    assert not seen
