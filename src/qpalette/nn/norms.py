"""RMSNorms in one kernel, where the model's own code starts six."""

from __future__ import annotations

import inspect

import torch
from torch import nn

_EPSILONS = ("variance_epsilon", "eps")  # what classes call it
_SIZES = (1.0, 1e-3, 30.0)  # of tokens: the small one shows the epsilon


def fuse_norms(model: nn.Module) -> int:
    """Puts a torch.nn.RMSNorm of the same weight in the place of every module that computes x / rms(x) * weight, and
    returns how many. Modules are judged by what they compute, not by their names: one that multiplies by 1 + weight,
    say, stays.

    A prompt of 1024 tokens through Llama-3.1-8B at 3.25 bits kept an H100 busy for 37.1 ms, where it was 40.6 (two runs
    of benchmarks/eager.py).
    """
    found = {name: epsilon for name, module in model.named_modules() if (epsilon := _epsilon_of(module)) is not None}
    for name, epsilon in found.items():
        old = model.get_submodule(name)
        assert isinstance(old.weight, nn.Parameter)
        fused = nn.RMSNorm(old.weight.shape, eps=epsilon, device="meta")
        fused.weight = old.weight
        model.set_submodule(name, fused.train(old.training))
    return len(found)


def _epsilon_of(module: nn.Module) -> float | None:
    """None for whatever is not such a norm."""
    weight, parameters = getattr(module, "weight", None), dict(module.named_parameters())
    if isinstance(module, nn.RMSNorm) or list(parameters) != ["weight"] or weight is None or weight.dim() != 1:
        return None
    if weight.device.type == "meta" or len(inspect.signature(module.forward).parameters) != 1:
        return None
    epsilon = next(
        (getattr(module, name) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None
    )
    if epsilon is None or not weight.is_floating_point():
        return None
    return epsilon if _normalises(module, weight, epsilon) else None


@torch.no_grad()
def _normalises(module: nn.Module, weight: torch.Tensor, epsilon: float) -> bool:
    """On tokens of several sizes, up to the two roundings of classes that round before they multiply by the weight."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(len(_SIZES), len(weight), generator=random) * torch.tensor(_SIZES)[:, None]
    x = tokens.to(weight.device, weight.dtype)
    try:
        found = module(x)
    except Exception:  # a norm of another kind of input, or whatever its class raises
        return False
    wanted = nn.functional.rms_norm(x.double(), weight.shape, weight.double(), epsilon)
    unit = 2 * torch.finfo(weight.dtype).eps
    return found.dtype == x.dtype and bool(((found.double() - wanted).abs() <= unit * (wanted.abs() + unit)).all())
