"""Where a model multiplies by its linears, seen from outside: dense ones and experts that are stacked in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qpalette.core.errors import CheckpointError
from qpalette.models.model_class import DOWN, EXPERT, FIRST, Modules

MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)  # x @ W^T, as some experts are stored
EAGER = "eager"  # transformers' name for one product per expert, in place of one for all

Seen = Callable[[str, Tensor, Tensor, slice], None]


class Weight(NamedTuple):
    """The matrix of one linear: a parameter, or the part of one that stacks all experts of a layer."""

    parameter: nn.Parameter
    expert: int | None = None
    rows: slice = slice(None)
    transposed: bool = False  # the parameter holds in_features x out_features

    def of(self, tensor: Tensor) -> Tensor:
        """This linear's [out_features, in_features] view of the parameter, or of a tensor like it."""
        if self.expert is None:
            return tensor
        matrix = tensor[self.expert]
        return (matrix.T if self.transposed else matrix)[self.rows]

    @property
    def values(self) -> Tensor:
        return self.of(self.parameter.data)

    @property
    def address(self) -> int:
        """Of the matrix that the model multiplies by: gate and up are rows of one."""
        return (self.parameter if self.expert is None else self.parameter.data[self.expert]).data_ptr()


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Weight]:
    """The weight of each linear or embedding, by its name in the checkpoint.

    Raises CheckpointError naming one that the model does not have.
    """
    modules = Modules(model)
    found = {}
    for name in names:
        place = modules.find(name)
        weight = None if place is None else getattr(modules.all[place], "weight", None)
        if isinstance(weight, nn.Parameter):
            found[name] = Weight(weight)
        elif (holder := modules.find_experts(name)) is not None:
            found[name] = _expert_weight(modules.all[holder], name)
        else:
            raise CheckpointError(
                f"the model that transformers builds has no weight '{name}.weight': it cannot be calibrated"
            )
    return found


def _expert_weight(module: Any, name: str) -> Weight:
    """transformers stacks gate above up, whatever the checkpoint calls them."""
    expert = EXPERT.fullmatch(name)
    assert expert is not None
    leaf, index = expert["leaf"], int(expert["index"])
    if leaf in DOWN:
        return Weight(module.down_proj, index, transposed=module.is_transposed)
    parameter = getattr(module, "gate_up_proj", None)
    if parameter is None:
        return Weight(module.up_proj, index, transposed=module.is_transposed)
    half = parameter.shape[2 if module.is_transposed else 1] // 2
    place = next((pair.index(leaf) for pair in FIRST if leaf in pair and len(pair) == 2), None)
    rows = slice(None) if place is None else slice(place * half, (place + 1) * half)
    return Weight(parameter, index, rows, module.is_transposed)


class Taps(TorchFunctionMode):
    """While it is entered, `seen(linear, x, y, rows)` is called after every product y[..., rows] = x W^T with the
    weight of a linear: x [..., K], y [..., at least M].

    Products are known by the address of their weight, so that nothing of the model is touched, and an expert, which has
    no module of its own, is seen like any other linear. Weights must stay where they are.
    """

    def __init__(self, weights: Mapping[str, Weight], seen: Seen) -> None:
        super().__init__()
        self._seen = seen
        self._linears: dict[int, list[tuple[str, slice]]] = {}
        for name, weight in weights.items():
            self._linears.setdefault(weight.address, []).append((name, weight.rows))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (func is F.linear or func in MATMULS) and len(args) > 1:
            for name, rows in self._linears.get(args[1].data_ptr(), ()):
                self._seen(name, args[0], result, rows)
        return result


@contextmanager
def one_expert_at_a_time(model: Any) -> Iterator[None]:
    """Experts are multiplied by one after the other, where `Taps` sees them."""
    before = getattr(model.config, "_experts_implementation", None)
    if before in (None, EAGER):
        yield
        return
    model.set_experts_implementation(EAGER)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
