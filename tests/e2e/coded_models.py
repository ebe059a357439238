"""Tiny models, and caches of codes for them."""

import torch
from tiny_model import VOCABULARY, build
from transformers import AutoConfig, AutoModelForCausalLM

from qpalette.kvcache import parse_cache
from qpalette.nn.coded_cache import CodedCache


def llama():
    return build("llama", max_position_embeddings=256)


def small(kind: str, **options):
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(common | options))).eval()


def tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def coded(model, spec: str, length: int = 64, **options) -> CodedCache:
    return CodedCache(model.config, parse_cache(spec), length, **options)


def logits_step_by_step(model, ids, cache):
    with torch.no_grad():
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])], 1)
