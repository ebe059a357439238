"""What a backend prepares for packed matrices that are being fitted, and the matrices decoded, kept while codes stay:
tuning multiplies by the same codes thousands of times, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from qpalette.runtime.contract import Backend, PackedLinear, Product

Key = tuple[object, ...]


class Kept:
    """Products of the matrices that `inner` was asked for, and W' of as many of them as fit `budget_bytes`; the rest
    are decoded at each use. Matrices are known by the addresses of their tensors, which are held meanwhile."""

    def __init__(self, budget_bytes: int) -> None:
        self._free = budget_bytes
        self._inner: dict[Key, tuple[PackedLinear, PackedLinear]] = {}
        self._known: set[Key] = set()
        self._products: dict[Key, Product] = {}
        self._weights: dict[Key, torch.Tensor] = {}

    def inner(self, packed: PackedLinear, make: Callable[[PackedLinear], PackedLinear]) -> PackedLinear:
        """`make(packed)`, the same for the same tensors."""
        key = _key(packed)
        if key not in self._inner:
            self._inner[key] = packed, make(packed)
            self._known.add(_key(self._inner[key][1]))
        return self._inner[key][1]

    def product(self, packed: PackedLinear, backend: Backend) -> Product | None:
        """Prepared, of an inner matrix; None of any other."""
        key = _key(packed)
        if key in self._known and key not in self._products:
            self._products[key] = backend.product([packed])
        return self._products.get(key)

    def rotated_weight(self, packed: PackedLinear, backend: Backend) -> torch.Tensor:
        """As `backend.rotated_weight`; nobody may write to it."""
        key = _key(packed)
        found = self._weights.get(key)
        if found is None:
            found = backend.rotated_weight(packed)
            if key in self._known and found.nbytes <= self._free:
                self._weights[key] = found
                self._free -= found.nbytes
        return found


def kept() -> Kept | None:
    """What is kept now."""
    return _now[-1] if _now else None


@contextmanager
def keeping(budget_bytes: int) -> Iterator[None]:
    """Inside, in all threads (backward passes have their own), what is prepared or decoded of fitted matrices stays."""
    _now.append(Kept(budget_bytes))
    try:
        yield
    finally:
        _now.pop()


_now: list[Kept] = []


def _key(packed: PackedLinear) -> Key:
    addresses = (tensor.data_ptr() for tensor in (packed.codes, packed.scales, packed.diagonal))
    return (*addresses, packed.spec, packed.rotation, packed.layout, packed.out_features, packed.in_features)
