"""The limits of the fuzzers see what they are for: whoever allocates, and whatever it is told."""

import gc
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from limits import SEES_EVERYTHING, TOUCHED_AT_LEAST, TRACED_AT_LEAST, StillBusy, bounded, traced

FILE = 1000  # bytes


@pytest.mark.skipif(not SEES_EVERYTHING, reason=f"no /proc on {sys.platform}")
def test_memory_that_torch_allocates_is_seen():
    """Far more than earlier tests may have left to be freed in between."""
    gc.collect()
    with traced(), pytest.raises(AssertionError, match="bytes of memory for 1000 on disk"), bounded(FILE):
        torch.ones(8 * TOUCHED_AT_LEAST, dtype=torch.uint8)


def test_memory_that_numpy_and_python_allocate_is_seen():
    for allocate in (lambda count: np.ones(count, np.uint8), bytearray):
        with traced(), pytest.raises(AssertionError, match="bytes allocated for 1000 on disk"), bounded(FILE):
            allocate(2 * TRACED_AT_LEAST)


def test_what_a_file_justifies_is_allowed():
    with traced(), bounded(FILE):
        torch.ones(TOUCHED_AT_LEAST // 2, dtype=torch.uint8)
        bytearray(TRACED_AT_LEAST // 2)
    with traced(), bounded(3 * TOUCHED_AT_LEAST // 400):
        torch.ones(2 * TOUCHED_AT_LEAST, dtype=torch.uint8)


def test_what_does_not_end_is_stopped_whatever_it_catches(monkeypatch):
    def read_on() -> None:
        while True:
            with suppress(Exception):
                time.sleep(0.01)

    monkeypatch.setattr("limits.HANGS", 1)
    with traced(), pytest.raises(StillBusy), bounded(FILE):
        read_on()
