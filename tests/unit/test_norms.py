"""RMSNorms that become torch's own: those that compute the same, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qpalette.nn import fuse_norms

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def model_of(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **HEADS), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1, 0.3)
    return model


# 1 + weight: gemma and qwen3_next; a gate beside the input: qwen3_next.
@pytest.mark.parametrize(
    ("kind", "count"), [("llama", 5), ("mistral", 5), ("qwen2", 5), ("qwen3", 9), ("gemma2", 0), ("gemma3_text", 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_that_compute_the_same_are_fused(kind: str, count: int, dtype: torch.dtype) -> None:
    model, ids = model_of(kind, dtype), torch.arange(20).reshape(2, 10)
    names = list(model.state_dict())
    with torch.no_grad():
        wanted = model(ids).logits
        assert fuse_norms(model) == count
        found = model(ids).logits
    assert list(model.state_dict()) == names
    assert sum(isinstance(module, nn.RMSNorm) for module in model.modules()) == count
    # Each norm rounds once where the class rounded twice; layers and products carry that on.
    assert (found - wanted).norm() <= 8 * torch.finfo(dtype).eps * wanted.norm()
    assert fuse_norms(model) == 0, "once"


class Norm(nn.Module):
    def __init__(self, power: float = 0.5, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)
        self.power, self.eps, self.really = power, 1e-6, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.really) ** self.power * self.weight


class Gated(Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


class Shifted(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(32))


@pytest.mark.parametrize("other", [Norm(power=0.4), Norm(epsilon=1e-4), Gated(), Shifted(), nn.LayerNorm(32)])
def test_what_computes_something_else_stays(other: nn.Module) -> None:
    model = nn.ModuleDict({"norm": Norm(), "other": other})
    assert fuse_norms(model) == 1
    assert model["other"] is other
