"""One forward of a model on the meta device: what each linear reads, and which weights the class computes with itself.

Nothing has a value there. Where a class asks for one (how many tokens has this expert?), it gets a zero; experts that
are stacked are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TOKENS = 12  # enough for a convolution's window
ZEROS = {Tensor.item: 0, Tensor.__bool__: False, Tensor.__int__: 0, Tensor.__float__: 0.0, Tensor.__index__: 0}
# What a packed weight answers as it is: what asks it for no value, and products.
_PROPERTIES = ("dtype", "device", "shape", "ndim", "layout", "is_meta", "is_cuda", "requires_grad", "grad", "is_sparse")
_QUESTIONS = ("size", "dim", "numel", "is_floating_point", "is_complex", "get_device", "stride", "__hash__", "__len__")
HARMLESS = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
        *(getattr(Tensor, name) for name in _QUESTIONS),
        *(torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__),
    )
)


@dataclass
class Seen:
    """What a forward did; names are those of modules."""

    inputs: dict[str, tuple[int, int]] = field(default_factory=dict)  # (number of its first call, of what it read)
    computed_outside: set[str] = field(default_factory=set)  # not by the module's own forward
    failure: Exception | None = None


def forward_on_meta(model: Any) -> Seen:
    """Run the text part of `model`, with inputs that fit until one does; what was seen of the attempt that went
    furthest."""
    best = Seen(failure=RuntimeError("no forward was tried"))
    for run, inputs in _attempts(model):
        seen = Seen()
        with torch.no_grad(), _watched(model, seen), _stacks_passed_over(model):
            try:
                run(**inputs)
            except Exception as error:  # what a class raises on inputs that it does not take
                seen.failure = error
        outside = best.computed_outside | seen.computed_outside  # some classes do a thing only once
        if len(seen.inputs) > len(best.inputs) or (best.failure is not None and seen.failure is None):
            best = seen
        best.computed_outside = outside
        if seen.failure is None:
            break
    return best


def _attempts(model: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    mask = torch.ones_like(ids)
    for run in (model, _language_model(model)):
        if run is None:
            continue
        yield run, {"input_ids": ids}
        yield run, {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        yield run, {"input_ids": ids, "decoder_input_ids": ids}
        yield run, {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": mask, "use_cache": False}


def _language_model(model: Any) -> Any | None:
    """The part that reads tokens, of a model that needs more than tokens."""
    found = getattr(model, "get_decoder", lambda: None)()
    return found if found is not model and isinstance(found, nn.Module) else None


def is_linear(module: nn.Module) -> bool:
    """Whether it computes what nn.Linear does."""
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and bool(_computes_linear(kind))


@lru_cache(maxsize=256)
def _computes_linear(kind: Any) -> bool:
    """Judged by what it computes, where its code is another."""
    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.device("cpu"), torch.no_grad():
            linear, x = kind(8, 4), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
            return torch.allclose(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    except Exception:  # another signature, or whatever such a class raises
        return False


class _Watch(TorchFunctionMode):
    def __init__(self, owners: dict[int, list[str]], running: list[str], seen: Seen) -> None:
        super().__init__()
        self._owners, self._running, self._seen = owners, running, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_meta and (answer := _without_value(func, first, args, kwargs)) is not None:
            return answer[0]
        if func not in HARMLESS:
            self._note(args, kwargs)
        return func(*args, **kwargs)

    def _note(self, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, nn.Parameter) or id(tensor) not in self._owners:
                    continue
                owners = self._owners[id(tensor)]
                if not any(module in self._running[-1:] for module in owners):
                    self._seen.computed_outside.update(owners)


def _without_value(func: Any, tensor: Tensor, args: Any, kwargs: Any) -> tuple[Any] | None:
    """(an answer), where the question has none on the meta device."""
    if func in ZEROS:
        return (ZEROS[func],)
    if func is Tensor.tolist:
        return (torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu").tolist(),)
    if func in (torch.equal, torch.allclose, Tensor.equal):
        return (False,)
    if func is Tensor.unique and not any(kwargs.get(each) for each in ("return_inverse", "return_counts")):
        return (tensor.new_empty(0),)
    if func in (torch.nonzero, Tensor.nonzero) or (func is torch.where and len(args) == 1):
        if func is torch.where or kwargs.get("as_tuple"):
            return (tuple(tensor.new_empty(0, dtype=torch.long) for _ in tensor.shape),)
        return (tensor.new_empty(0, tensor.dim(), dtype=torch.long),)
    return None


@contextmanager
def _watched(model: nn.Module, seen: Seen) -> Iterator[None]:
    owners: dict[int, list[str]] = {}  # modules that share a weight
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    running: list[str] = []
    held: dict[int, Tensor] = {}  # inputs, so that none gets the address of another
    hooks = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            running.append(name)
            x = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
            if isinstance(x, Tensor):
                held[id(x)] = x
                seen.inputs.setdefault(name, (len(seen.inputs), id(x)))

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        with _Watch(owners, running, seen):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _stacks_passed_over(model: nn.Module) -> Iterator[None]:
    """Modules of stacked experts return their input: their products ask for types and sizes that depend on values."""
    stacks = [module for module in model.modules() if hasattr(module, "has_gate")]
    for module in stacks:
        module.forward = lambda x, *_args, **_kwargs: torch.zeros_like(x)
    try:
        yield
    finally:
        for module in stacks:
            del module.forward
