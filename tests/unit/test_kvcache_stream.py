"""Pages, exact tokens and what may happen to a sequence, against a list of tokens that knows everything."""

import pytest
import torch

from qpalette.kvcache import PAGE, Exact, Stream, VectorFormat, parse_code, white

BATCH, HEADS, DIM, LENGTH = 3, 2, 16, 150


def stream(exact: Exact, length: int = LENGTH) -> Stream:
    format = VectorFormat(parse_code("vq-2"), DIM, unbiased=False)
    return Stream(format, white(DIM), exact, (BATCH, HEADS, length), torch.float32, torch.device("cpu"))


def vectors(count: int) -> torch.Tensor:
    return torch.randn(BATCH, HEADS, count, DIM, generator=torch.Generator().manual_seed(count))


def coded(x: torch.Tensor) -> torch.Tensor:
    plain = stream(Exact(0, 0))
    stored = plain.format.encode(plain.transform.apply(x), plain.points)
    return plain.transform.undo(plain.format.decode(*stored, plain.points))


def write(target: Stream, x: torch.Tensor, start: int, starts: torch.Tensor, step: int) -> None:
    for first in range(0, x.shape[2], step):
        part = x[:, :, first : first + step]
        target.write(part, torch.arange(part.shape[2]) + start + first, starts)


def expected(x: torch.Tensor, exact: Exact, starts: torch.Tensor) -> torch.Tensor:
    """Token by token."""
    result, count = coded(x), x.shape[2]
    for sequence in range(BATCH):
        for token in range(count):
            is_sink = 0 <= token - int(starts[sequence]) < exact.sinks
            if is_sink or token >= count - exact.window:
                result[sequence, :, token] = x[sequence, :, token]
    return result


def read(source: Stream, count: int, starts: torch.Tensor) -> torch.Tensor:
    whole = source.read(torch.tensor(count), starts)
    assert whole.shape == (BATCH, HEADS, source.length, DIM)
    return whole[:, :, :count]


@pytest.mark.parametrize("exact", [Exact(0, 0), Exact(4, 0), Exact(0, 5), Exact(3, 7), Exact(4, 200)])
@pytest.mark.parametrize("starts", [(0, 0, 0), (0, 3, 70)])
@pytest.mark.parametrize("step", [1, 9, LENGTH])
def test_exact_tokens_are_exact_and_the_others_coded(exact, starts, step):
    x, begins, target = vectors(140), torch.tensor(starts), stream(exact)
    write(target, x, 0, begins, step)
    torch.testing.assert_close(read(target, 140, begins), expected(x, exact, begins))


def test_the_bytes_of_a_page():
    x, target, begins = vectors(LENGTH), stream(Exact(0, 0)), torch.zeros(BATCH, dtype=torch.int64)
    write(target, x, 0, begins, 11)
    size = target.format.code_bytes
    codes, scales = target.format.encode(target.transform.apply(x), target.points)
    for token in (0, 1, 63, 64, 149):
        page, place = divmod(token, PAGE)
        stored = target.pages[1, 1, page]
        assert torch.equal(stored[place * size : (place + 1) * size], codes[1, 1, token])
        assert stored[PAGE * size + place] == scales[1, 1, token]
    assert target.pages.shape == (BATCH, HEADS, 3, PAGE * (size + 1))


@pytest.mark.parametrize("exact", [Exact(4, 0), Exact(2, 6)])
def test_what_is_cut_off_is_forgotten(exact):
    """A window's older tokens were coded, too: they are read coded after a cut, never the tokens that were cut."""
    x, begins, target = vectors(120), torch.tensor([0, 3, 100]), stream(exact)
    write(target, x, 0, begins, 120)
    target.cut(90)
    found = read(target, 90, begins)
    sinks_only = expected(x, Exact(exact.sinks, 0), begins)[:, :, :90]
    torch.testing.assert_close(found, sinks_only)
    again = vectors(121)[:, :, :30]
    write(target, again, 90, begins, 7)
    whole = torch.cat([x[:, :, :90], again], 2)
    torch.testing.assert_close(read(target, 120, begins), expected(whole, exact, begins))


def test_sequences_are_chosen_in_place():
    x, begins, target = vectors(100), torch.tensor([0, 0, 2]), stream(Exact(2, 3))
    write(target, x, 0, begins, 100)
    before, addresses = read(target, 100, begins), [memory.data_ptr() for memory in target.memory]
    order = torch.tensor([2, 2, 0])
    target.select(order)
    torch.testing.assert_close(read(target, 100, begins[order]), before[order])
    assert [memory.data_ptr() for memory in target.memory] == addresses


def test_a_copy_of_another_length_goes_on_alike():
    x, begins, exact = vectors(100), torch.tensor([0, 1, 0]), Exact(2, 4)
    source, target = stream(exact, 100), stream(exact, 400)
    write(source, x, 0, begins, 100)
    target.copy(source, 80)
    torch.testing.assert_close(read(target, 80, begins), expected(x, Exact(2, 0), begins)[:, :, :80])


def test_padding_leaves_no_trace_in_other_tokens():
    begins, target, other = torch.tensor([0, 0, 5]), stream(Exact(2, 2)), stream(Exact(2, 2))
    x = vectors(40)
    strange = x.clone()
    strange[2, :, :5] = 1e30
    write(target, x, 0, begins, 40)
    write(other, strange, 0, begins, 40)
    assert torch.equal(read(target, 40, begins)[2, :, 5:], read(other, 40, begins)[2, :, 5:])
