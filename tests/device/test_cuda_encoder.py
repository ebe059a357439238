"""The CUDA encoder against the reference, on a GPU: equal codes, bit for bit."""

import pytest
import torch

from qpalette.codes import parse_spec
from qpalette.runtime import backends, select

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPECS = [
    *("tcq-1", "tcq-1.5-L12", "tcq-2", "tcq-2.375", "tcq-3.25", "tcq-4", "tcq-5.5-L12", "tcq-8", "tcq-8-L12"),
    *("tcq2-1", "tcq2-1.125-L12", "tcq2-2", "tcq2-2-L12", "tcq2-3.25", "tcq2-4.5", "tcq2-5", "tcq2-5-L12"),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tiles", [1, 5, 19])
def test_codes_equal_the_reference(spec: str, tiles: int) -> None:
    source = torch.randn(tiles, 256, generator=torch.Generator().manual_seed(tiles))
    source[0] = 0
    source[-1] *= 50
    cuda = torch.device("cuda")
    assert select("encode", spec, cuda).name == "cuda"
    expected = backends()["ref"].encode(spec, source.to(cuda))
    assert torch.equal(select("encode", spec, cuda).encode(spec, source.to(cuda)), expected)


@pytest.mark.parametrize("spec", ["tcq-3-L18", "tcq-2-L20", "tcq2-3-L18"])
def test_long_memories_spill_and_still_equal_the_reference(spec: str) -> None:
    source = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).cuda()
    assert torch.equal(backends()["cuda"].encode(spec, source), parse_spec(spec).encode(source))


def test_more_tiles_than_scratch_memory_holds_at_once() -> None:
    source = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    codes = backends()["cuda"].encode("tcq-3", source.cuda()).cpu()
    some = torch.randint(4096, (8,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(codes[some], backends()["ref"].encode("tcq-3", source[some]))
