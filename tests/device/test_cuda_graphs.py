"""A capture that fails leaves the process as it was."""

from __future__ import annotations

import pytest
import torch

from qpalette.backends.cuda.graphs import capture_graph
from qpalette.backends.cuda.timing import graph_seconds

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("capture", [capture_graph, lambda work: graph_seconds([work])], ids=["a step", "a timing"])
def test_after_a_capture_that_fails_all_goes_on(capture) -> None:
    before, drawn = torch.cuda.current_stream(), torch.zeros(8, device="cuda")

    def refused() -> None:
        drawn.uniform_()
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while a stream is captured")

    with pytest.raises(RuntimeError, match="not while a stream is captured"):
        capture(refused)
    assert torch.cuda.current_stream() == before
    torch.cuda.manual_seed(0)
    wanted = torch.rand(8, device="cuda")  # torch's generator would believe that the capture goes on
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.rand(8, device="cuda"), wanted)
    capture(lambda: drawn.uniform_())
