"""Windows that are set aside: so many that enough are left, none that is calibrated on, from all over the text."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qpalette.api import HELD_OUT, _split


@pytest.mark.parametrize(("windows", "count"), [(72, 64), (9, 8), (2, 1), (5, 4), (40, 64), (3, 64), (9, 64), (65, 64)])
def test_both_parts_of_a_text(windows, count):
    text = [torch.full((4,), number) for number in range(windows)]
    calibrated, apart = ([int(window[0]) for window in part] for part in _split(text, count))
    assert sorted(calibrated + apart) == list(range(windows))
    assert calibrated == sorted(calibrated)
    assert apart == sorted(apart)
    assert len(calibrated) == min(count, windows - max(1, windows // HELD_OUT))
    gaps = [b - a for a, b in pairwise([-1, *apart, windows])]
    assert max(gaps) <= windows // len(apart) + 1  # nowhere is a stretch of text unmeasured


def test_a_text_of_one_window_is_both():
    window = torch.arange(4)
    assert _split([window], 1) == ([window], [window])
