"""A step over the GPU's streams under torch.compile, as far as it goes without a GPU: which operators it becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers import LlamaConfig, LlamaForCausalLM

from qpalette.backends.cuda.streams import CudaStream
from qpalette.integrations import attention as _grouped  # noqa: F401 - makes "grouped" known to transformers
from qpalette.kvcache import parse_cache
from qpalette.nn.coded_cache import CodedCache
from qpalette.runtime import select

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.mark.parametrize("attention", ["grouped", "sdpa"])
def test_a_compiled_step_calls_the_kernels(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write a layer; where the attention function takes codes, they are attended to, else decoded. The graph is
    whole, and its shapes are known: running it is what needs a GPU."""
    monkeypatch.setattr(type(select("cache", "nuq-3", torch.device("cpu"))), "stream", CudaStream)
    model = LlamaForCausalLM._from_config(CONFIG, dtype=torch.float16, attn_implementation=attention).eval()
    cache = CodedCache(CONFIG, parse_cache("white:nuq-3"), 40)
    states = torch.zeros(1, 2, 1, 16, dtype=torch.float16)
    for layer in cache.layers:
        layer.lazy_initialization(states, states)
        layer.set_length(7)
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=keep)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="cuda_cache_write"):
        step(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache)
    called = [str(node.target).rpartition("cuda_cache_")[2] for node in graphs[0].graph.nodes]
    found = {name: called.count(name) for name in ("write", "attend", "read")}
    assert found == {"write": 2, "attend": 2 * (attention == "grouped"), "read": 4 * (attention == "sdpa")}
