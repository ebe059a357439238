"""Linears that read the same input (q/k/v, gate/up) run as one launch, inside model code that calls them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from qpalette.core.errors import ArtifactError
from qpalette.nn.fuse_graph import install
from qpalette.nn.packed_module import PackedModule
from qpalette.nn.quant_linear import QuantLinear
from qpalette.runtime import PreparedLinears

_WAITING = "_qpalette_waiting"  # attribute of an input: what it was multiplied by already


class _Results(NamedTuple):
    """Of one input, by member; `version` is the input's when it was multiplied."""

    version: int
    outputs: dict[int, torch.Tensor]


class Launch:
    """The first of `members` to be called with an input computes all of them; the others find their result waiting.

    It waits on the input itself, with the input's version: it lives no longer than that tensor, an input that was
    written to since is multiplied anew, and neither a thread nor an exception leaves anything behind. Where a tensor
    has no version (inference mode), or gradients are wanted, each member computes its own. Under torch.compile each
    asks for its own, too, and `fuse_graph` makes one launch of those.

    The disk, the module names and the model's code know nothing of it.
    """

    def __init__(self, name: str, members: list[QuantLinear]) -> None:
        self.name, self.members = name, members
        self._prepared: PreparedLinears | None = None  # for the members' tensors at the last call

    def output_of(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What member `index` makes of x, its bias left out."""
        if torch.compiler.is_compiling():
            return self.members[index].multiply(x, self.name)
        waiting: dict[Launch, _Results] | None = x.__dict__.get(_WAITING)
        if waiting is not None and (results := waiting.get(self)) is not None and results.version == x._version:
            result = results.outputs.pop(index, None)
            if not results.outputs:
                del waiting[self]
            if result is not None:
                return result
        if not _can_wait(x) or (together := self._together()) is None:
            return self.members[index].multiply(x, self.name)
        outputs = dict(enumerate(together(x)))
        x.__dict__.setdefault(_WAITING, {})[self] = _Results(x._version, outputs)
        return outputs.pop(index)

    def _together(self) -> PreparedLinears | None:
        """None while a member is being fitted."""
        prepared = self._prepared
        if prepared is None or not all(map(PackedModule.is_of, self.members, prepared.members)):
            if any(member.fitted for member in self.members):
                return None
            prepared = self._prepared = PreparedLinears([member.stored for member in self.members], self.name)
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        """What is prepared has addresses in it, which a copy does not share."""
        return self.__dict__ | {"_prepared": None}


def _can_wait(x: torch.Tensor) -> bool:
    return type(x) is torch.Tensor and not x.is_inference() and not (x.requires_grad and torch.is_grad_enabled())


def join_launches(model: nn.Module) -> int:
    """Joins the packed linears of one parent that are of one group; returns how many launches there are.

    Linears are joined where their backend gains from it; call after `prepare`. Raises ArtifactError when linears of one
    group have different diagonals: they cannot read one input in one basis.
    """
    launches = 0
    for parent_name, parent in model.named_modules():
        for group, members in _families(parent):
            for member in members[1:]:
                if not torch.equal(member.stored.diagonal, members[0].stored.diagonal):
                    raise ArtifactError(
                        f"linears of group '{group}' in {parent_name} have different signs, so they do not read one "
                        "input; download the model again"
                    )
            launch = Launch(f"{parent_name}:{group}", members)
            for index, member in enumerate(members):
                member.launch, member.index = launch, index
            launches += 1
    if launches:
        install()
    return launches


def _families(parent: nn.Module) -> Iterator[tuple[str, list[QuantLinear]]]:
    """(group, its members) of the children of `parent`; those of one layout, where a backend fuses."""
    found: dict[tuple[str, str], list[QuantLinear]] = {}
    for child in parent.children():
        if isinstance(child, QuantLinear) and child.qp_codes.device.type != "meta" and child.backend.fuses:
            found.setdefault((_group_of(child), child.layout), []).append(child)
    return ((group, members) for (group, _), members in found.items() if group and len(members) > 1)


def _group_of(linear: QuantLinear) -> str:
    """The stored id. Versions 1 and 2 of the format have none: there, signs were drawn for each group by its name, so
    equal signs and rotation under one parent mean one input."""
    record = linear.record
    return record.group or f"{record.rotation}:{linear.stored.diagonal.cpu().numpy().tobytes().hex()}"
