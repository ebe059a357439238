"""What a backend is: a folder under `qpalette.backends` whose `backend` attribute implements `Backend`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import torch

from qpalette.kvcache import Stream

Operation = Literal["encode", "linear", "cache"]
TILES = "tiles"  # the stored layout of codes: int32 [ceil(M/16), ceil(K/16), words per tile]


class Verdict(NamedTuple):
    """Whether a backend can do something, and why not if it cannot."""

    ok: bool
    reason: str = ""


@dataclass(slots=True)  # not frozen: one is made per call, and a frozen one costs more to make
class PackedLinear:
    """A quantized weight matrix W' (M x K) in the rotated basis, as tensors.

    codes: int32, in `layout`; scales: int16 [M], the bits of one float16 per row; diagonal, which multiplies the input
    before the rotation: uint8 [ceil(K/8)], packed signs, or int16 [K], the bits of one float16 per input; spec and
    rotation: canonical names. While they are being fitted, scales [M] and diagonal [K] may be floating tensors.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    diagonal: torch.Tensor
    spec: str
    rotation: str
    out_features: int
    in_features: int
    layout: str = TILES

    def with_(self, **changes: torch.Tensor) -> PackedLinear:
        """The same with other tensors."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The matrices of all experts of a layer, packed, in one layout.

    first: by expert, the matrices that read a token, whose results side by side [F] go through `gate` (a `Gate`, or a
    class's own function) to [I]; last: by expert, what reads those. first_bias float [E, F] and last_bias float [E, K]
    are added to the products.
    """

    first: Sequence[Sequence[PackedLinear]]
    last: Sequence[PackedLinear]
    gate: Callable[[torch.Tensor], torch.Tensor]
    first_bias: torch.Tensor | None = None
    last_bias: torch.Tensor | None = None

    @property
    def members(self) -> list[PackedLinear]:
        """Expert by expert, the last matrix of each behind its first ones."""
        return [member for first, last in zip(self.first, self.last, strict=True) for member in (*first, last)]

    def of_one(self, x: torch.Tensor, expert: int, first: Product, last: Product) -> torch.Tensor:
        """What one expert makes of x [n, K], by products with its matrices."""
        inner = torch.cat(first(x), dim=-1)
        if self.first_bias is not None:
            inner = inner + self.first_bias[expert]
        (result,) = last(self.gate(inner))
        return result if self.last_bias is None else result + self.last_bias[expert]


Product = Callable[[torch.Tensor], list[torch.Tensor]]
"""x [..., K], any float dtype -> W x [..., M] of the same dtype, for each matrix of some that read one input."""
ExpertsProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x [N, K], any float dtype, index int64 [N, k] and weights float [N, k] -> the weighted sum of the experts of each
token, [N, K] of x's dtype. An index outside 0 .. E-1 is a slot that does not exist."""


class Backend(ABC):
    """Encodes tiles and multiplies by packed weights on some device. Stateless; results must equal `ref`'s."""

    name: ClassVar[str]
    priority: ClassVar[int]  # the highest that supports a problem is used
    layout: ClassVar[str] = TILES  # how it likes its codes; `to_layout` and `from_layout` convert
    fuses: ClassVar[bool] = False  # whether `linears` is better than `linear` one by one
    stream: ClassVar[type[Stream]] = Stream  # what keeps keys or values as codes
    in_int8: ClassVar[bool] = False  # whether it can multiply prompts so: `prefill.py`

    @abstractmethod
    def supports(self, operation: Operation, spec: str, device: torch.device) -> Verdict:
        """Whether this backend can do `operation` for quantizer or cache code `spec` with tensors on `device`."""

    @abstractmethod
    def encode(self, spec: str, tiles: torch.Tensor) -> torch.Tensor:
        """float32 [tiles, 256] of unit variance, in scan order -> int32 [tiles, words per tile]."""

    @abstractmethod
    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        """int32 [tiles, words per tile] -> float32 [tiles, 256], in scan order."""

    @abstractmethod
    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        """x [N, K], any float dtype -> [N, M] of the same dtype: the rotation of x, then the product with W'."""

    def linears(self, x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
        """`linear` of several matrices that read the same input in the same basis (equal diagonal and rotation), each
        with its own spec: [N, sum of their M], side by side."""
        return torch.cat([self.linear(x, member) for member in members], dim=1)

    def product(self, members: Sequence[PackedLinear]) -> Product:
        """`linears` of these matrices, one result for each, as a function that may be called any number of times: what
        does not depend on x can be prepared here. It reads the tensors' present values at each call, and it may be
        called by several threads at once."""
        rows = [member.out_features for member in members]

        def multiply(x: torch.Tensor) -> list[torch.Tensor]:
            together = self.linears(x.reshape(-1, x.shape[-1]), members)
            return [part.reshape(*x.shape[:-1], part.shape[-1]) for part in together.split(rows, dim=1)]

        return multiply

    def experts(self, experts: PackedExperts) -> ExpertsProduct:
        """The experts of a layer, as a function prepared as `product`'s.

        A token's slots are added in the router's order. A backend that has this makes a token's bits independent of the
        tokens beside it; here they are as independent as those of `product`.
        """

        @cache
        def product(expert: int, last: bool) -> Product:
            members = [experts.last[expert]] if last else experts.first[expert]
            if in_one_basis(members):
                return self.product(members)
            alone = [self.product([member]) for member in members]
            return lambda x: [multiply(x)[0] for multiply in alone]

        def run(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            def of_expert(rows: torch.Tensor, expert: int) -> torch.Tensor:
                return experts.of_one(rows, expert, product(expert, False), product(expert, True))

            return in_runs(x, index, weights, len(experts.last), of_expert)

        return run

    @abstractmethod
    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        """W', float32 [M, K], scales applied, still in the rotated basis."""

    def to_layout(self, codes: torch.Tensor, spec: str) -> torch.Tensor:
        """Stored codes of `spec` -> this backend's layout."""
        return codes

    def expect(self, packed: PackedLinear) -> None:
        """Told of every matrix that is laid out for products, before the first of them: a backend that compiles kernels
        may make one for all. Nothing depends on it, and it ends when the codes are freed."""
        return None

    def from_layout(self, codes: torch.Tensor, spec: str, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        """This backend's layout -> stored codes of `stored_shape`."""
        return codes

    def tile_rows(
        self, codes: torch.Tensor, rows: torch.Tensor, spec: str, stored_shape: tuple[int, int, int]
    ) -> torch.Tensor:
        """Some tile rows of codes in this backend's layout: `rows` int64 [n] -> int32 [n, tile columns, words].

        An embedding looks rows up: override it where undoing the whole layout is the only other way.
        """
        return self.from_layout(codes, spec, stored_shape)[rows]


def in_one_basis(members: Sequence[PackedLinear]) -> bool:
    """Whether one rotation of their input serves them all."""
    first = members[0]
    return all(
        member.rotation == first.rotation and torch.equal(member.diagonal, first.diagonal) for member in members[1:]
    )


@torch.compiler.disable(reason="these experts are called one by one, as many as the tokens are routed to")
def in_runs(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    of_expert: Callable[[torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """An `ExpertsProduct` of `count` experts, one after the other: `of_expert` is given all rows [., K] that are routed
    to one. The host waits once, for how many those are. Differentiable in x and weights where `of_expert` is in x."""
    ranks = index.shape[1]
    absent = (index < 0) | (index >= count)
    owners = index.masked_fill(absent, count).reshape(-1)
    order = torch.argsort(owners, stable=True)
    outputs = []
    for expert, slots in enumerate(order.split(torch.bincount(owners, minlength=count + 1).tolist())):
        if expert == count:
            outputs.append(x.new_zeros(len(slots), x.shape[1]))
        elif len(slots):
            outputs.append(of_expert(x[slots // ranks], expert))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    by_rank = torch.cat(outputs)[back].reshape(*index.shape, x.shape[1]).unbind(1)
    kind = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(x.shape, dtype=kind)
    for output, weight in zip(by_rank, weights.masked_fill(absent, 0).to(kind).unbind(1), strict=True):
        total = total + output * weight[:, None]
    return total.to(x.dtype)
