"""Under torch.compile: products of one group that read one input become one launch, in the graph.

A pass of Inductor's, over a graph without mutations: equal nodes are equal values there, so nothing is kept and nothing
can be stale. Other compilers of torch.compile run the products one by one.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

VERSION = "1"  # of what the pass makes of a graph: compiled graphs are cached under it


class FuseLaunches(CustomGraphPass):
    """After `before`, the pass that somebody else had put there."""

    def __init__(self, before: Any = None) -> None:
        self.before = before

    def __call__(self, graph: Graph) -> None:
        if self.before is not None:
            self.before(graph)
        place = {node: index for index, node in enumerate(graph.nodes)}
        launches: dict[Any, list[Node]] = {}
        for node in graph.nodes:
            if node.target is torch.ops.qpalette.linear.default and node.args[-1]:
                x, *_, rotation, layout, _, columns, group = node.args
                launches.setdefault((x, rotation, layout, columns, group), []).append(node)
        for members in launches.values():
            if len(members) > 1 and _are_known(members, place):
                _fuse(graph, members)

    def uuid(self) -> Any:
        before = self.before.uuid() if isinstance(self.before, CustomGraphPass) else repr(self.before)
        return f"qpalette {VERSION} after {before}"


def install() -> None:
    """From now on Inductor fuses; a second call changes nothing."""
    if not isinstance(config.post_grad_custom_pre_pass, FuseLaunches):
        config.post_grad_custom_pre_pass = FuseLaunches(config.post_grad_custom_pre_pass)


def _are_known(members: list[Node], place: dict[Node, int]) -> bool:
    """Whether all that the products need is there before the first of them."""
    return all(place[need] < place[members[0]] for member in members for need in member.all_input_nodes)


def _fuse(graph: Graph, members: list[Node]) -> None:
    x, _, _, diagonal, _, rotation, layout, _, columns, _ = members[0].args
    codes, scales, specs, rows = ([member.args[place] for member in members] for place in (1, 2, 4, 7))
    with graph.inserting_before(members[0]):
        arguments = (x, codes, scales, diagonal, specs, rotation, layout, rows, columns)
        together = graph.call_function(torch.ops.qpalette.linears.default, arguments)
        value = members[0].meta["val"]
        ends: list[int] = list(accumulate(rows))  # type: ignore[arg-type]
        together.meta["val"] = value.new_empty(*value.shape[:-1], ends[-1])
        for member, start, end in zip(members, [0, *ends], ends, strict=False):
            part = graph.call_function(torch.ops.aten.slice.Tensor, (together, value.dim() - 1, start, end))
            part.meta["val"] = torch.ops.aten.slice.Tensor(together.meta["val"], value.dim() - 1, start, end)
            member.replace_all_uses_with(part)
    for member in members:
        graph.erase_node(member)
