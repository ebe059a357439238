"""Pages of a mapped file are let go, and nothing else is."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpalette.core.mapped import MAPS, MappedFiles, resident_bytes

pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="what is mapped is only told by Linux")
SIZE = 1 << 18  # float32 numbers: many pages


@pytest.fixture
def file(tmp_path):
    save_file({name: torch.randn(SIZE) for name in ("one", "other")}, tmp_path / "two.safetensors")
    return tmp_path / "two.safetensors"


def test_pages_go_and_come_again(file):
    tensors = load_file(file)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}  # reads all of it
    before = resident_bytes(file)
    MappedFiles().let_go(tensors["one"].data_ptr(), tensors["one"].nbytes)
    assert before >= 8 * SIZE
    assert resident_bytes(file) <= before - 4 * SIZE + (2 << 12)
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_memory_that_is_no_file_stays(file):
    load_file(file)
    for tensor in (torch.randn(SIZE), torch.empty(0)):
        expected = tensor.clone()
        MappedFiles().let_go(tensor.data_ptr(), tensor.nbytes)
        assert torch.equal(tensor, expected)


def test_what_was_mapped_later_stays(file):
    known = MappedFiles()
    tensors = load_file(file)
    expected = tensors["one"].clone()
    before = resident_bytes(file)
    known.let_go(tensors["one"].data_ptr(), tensors["one"].nbytes)
    assert resident_bytes(file) == before
    assert torch.equal(tensors["one"], expected)
