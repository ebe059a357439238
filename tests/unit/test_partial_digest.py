"""The digest that tells of bits a disk has lost: of every block, whoever hashes them."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from qpalette.pipeline import partial
from qpalette.pipeline.partial import digest_of


@pytest.mark.parametrize("place", [0, 15, 16, 63, 64, 99])
def test_a_bit_anywhere_is_told(place, monkeypatch):
    monkeypatch.setattr(partial, "BLOCK_BYTES", 16)
    one, two = torch.arange(64, dtype=torch.uint8), torch.arange(36, dtype=torch.uint8)
    before = digest_of(one, two)
    changed = torch.cat([one, two])
    changed[place] ^= 1
    assert digest_of(*changed.split([64, 36])) != before == digest_of(one.view(8, 8), two)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not forked there")
def test_a_forked_process_can_hash_after_its_parent_has():
    tensor = torch.ones(100)
    before = digest_of(tensor)
    if (child := os.fork()) == 0:
        os._exit(0 if digest_of(tensor) == before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
