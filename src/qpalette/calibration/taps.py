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
from qpalette.models.resolver import Place, places_of

# Also x @ W^T, as some experts are stored, and a Conv1D's.
PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.addmm)
EAGER = "eager"  # transformers' name for one product per expert, in place of one for all

Seen = Callable[[str, Tensor, Tensor, slice], None]


class Weight(NamedTuple):
    """The matrix of one linear: a parameter, or the part of one that stacks all experts of a layer."""

    parameter: nn.Parameter
    place: Place

    @property
    def rows(self) -> slice:
        """Of the product with the parameter, or with one expert's part of it, that are this linear's."""
        height = self.values.shape[0]
        return slice(None) if self.place.parts == 1 else slice(self.place.part * height, (self.place.part + 1) * height)

    def of(self, tensor: Tensor) -> Tensor:
        """This linear's [out_features, in_features] view of the parameter, or of a tensor like it."""
        return self.place.of(tensor)

    @property
    def values(self) -> Tensor:
        return self.of(self.parameter.data)

    @property
    def address(self) -> int:
        """Of the matrix that the model multiplies by: gate and up are rows of one."""
        expert = self.place.expert
        return (self.parameter if expert is None else self.parameter.data[expert]).data_ptr()


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Weight]:
    """The weight of each linear or embedding, by its name in the checkpoint.

    Raises CheckpointError naming one that the model does not have.
    """
    wanted = list(names)
    places = places_of(model, wanted)
    if missing := next((name for name in wanted if name not in places), None):
        raise CheckpointError(
            f"the model that transformers builds has no weight '{missing}.weight': it cannot be calibrated"
        )
    return {name: Weight(model.get_parameter(place.path), place) for name, place in places.items()}


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
        first = 1 if func is torch.addmm else 0  # a bias comes before the two
        if (func in PRODUCTS) and len(args) > first + 1:
            for name, rows in self._linears.get(args[first + 1].data_ptr(), ()):
                self._seen(name, args[first], result, rows)
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
