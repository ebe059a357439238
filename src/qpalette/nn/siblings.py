"""Linears that read the same input (q/k/v, gate/up) run as one launch, inside model code that calls them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import nn

from qpalette.nn.quant_linear import QuantLinear
from qpalette.runtime import packed_linears


class Siblings:
    """The first of `members` to be called with an input computes all of them; the others find their result waiting.

    The module that is called must be called with the very same tensor; with another one everything is computed anew.
    The disk, the module names and the model's code know nothing of it.
    """

    def __init__(self, members: list[QuantLinear]) -> None:
        self.members = members
        self.input: torch.Tensor | None = None
        self.waiting: dict[int, torch.Tensor] = {}

    def output_of(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What member `index` makes of x, its bias left out."""
        if self.input is not x or index not in self.waiting:
            together = packed_linears(x, [member.packed for member in self.members])
            outputs = together.split([member.out_features for member in self.members], dim=-1)
            self.input, self.waiting = x, dict(enumerate(outputs))
        output = self.waiting.pop(index)
        if not self.waiting:
            self.input = None
        return output


def join_siblings(model: nn.Module) -> int:
    """Joins the packed linears of one parent that share their input; returns how many groups there are.

    Signs are drawn for each group by its name, so equal signs and rotation under one parent mean one input. Linears are
    joined where their backend fuses; call after `prepare`.
    """
    groups = 0
    for parent in model.modules():
        for members in _families(parent):
            siblings = Siblings(members)
            for index, member in enumerate(members):
                member.join(siblings.output_of, index)
            groups += 1
    return groups


def _families(parent: nn.Module) -> Iterator[list[QuantLinear]]:
    children = [child for child in parent.children() if isinstance(child, QuantLinear) and child.fuses]

    def basis(child: QuantLinear) -> tuple[str, str, bytes]:
        return child.record.rotation, child.layout, child.qp_signs.cpu().numpy().tobytes()

    for _, members in groupby(sorted(children, key=basis), key=basis):
        family = list(members)
        if len(family) > 1:
            yield family
