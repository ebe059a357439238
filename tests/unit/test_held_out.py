"""What is held out: the same tokens however a text is cut, from all of it, and never what something is fitted to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpalette.evaluate.held_out import BLOCK, EVERY, split, usual, windows_around

WHOLE = BLOCK * EVERY


def cut(tokens: int, length: int) -> list[torch.Tensor]:
    """A text whose tokens are their own places."""
    return list(torch.arange(tokens // length * length).split(length))


def places(windows: list[torch.Tensor]) -> set[int]:
    return set(torch.cat(windows).tolist()) if windows else set()


@given(
    blocks=st.integers(EVERY, 4 * EVERY),
    lengths=st.tuples(*[st.integers(64, BLOCK)] * 2),
    most=st.integers(1, 8),
)
def test_what_one_command_holds_out_another_does_not_fit_to(blocks, lengths, most):
    (fitted, held_out), (others, _) = (split(cut(blocks * BLOCK, length), most) for length in lengths)
    last = {token for token in range(blocks * BLOCK) if token // BLOCK % EVERY == EVERY - 1}
    assert not last & (places(fitted) | places(others))
    assert 1 <= len(held_out) <= most
    assert all(places([window]) & last for window in held_out)
    if BLOCK % lengths[0] == 0:
        assert places(held_out) <= last


@given(length=st.sampled_from([128, 512, 2048]), periods=st.integers(4, 12))
def test_what_is_held_out_comes_from_all_of_the_text(length, periods):
    windows = cut(periods * WHOLE, length)
    _, held_out = split(windows, 4)
    gaps = torch.tensor([0, *(int(window[0]) for window in held_out), periods * WHOLE]).diff()
    assert len(held_out) == 4
    assert int(gaps.max()) <= (periods // 4 + 1) * WHOLE


@pytest.mark.parametrize("most", [1, 3, 20])
def test_a_short_text_ends_with_what_is_held_out(most):
    windows = cut(WHOLE - BLOCK, 1024)
    fitted, held_out = split(windows, most)
    assert places(fitted) | places(held_out) == places(windows)
    assert len(held_out) == min(most, len(windows) - 1)
    assert min(places(held_out)) > max(places(fitted))


def test_a_single_window_is_both():
    window = torch.arange(10)
    assert split([window], 8) == ([window], [window])


@given(count=st.integers(1, 200), length=st.sampled_from([16, 300, 512, 2048, 4096, 40_000]))
def test_as_few_windows_are_read_as_leave_enough(count, length):
    most = usual(count)
    number = windows_around(count, length, most)
    fitted, held_out = split(cut(number * length, length), most)
    assert len(fitted) >= count
    assert held_out
    assert number == count + 1 or len(split(cut((number - 1) * length, length), most)[0]) < count
