"""The choice as plain arrays: every option's loss and costs, in segments, variants and blocks.

A block is a set of linears that is decided together; a variant is one way to cut a block into launches; a segment is
one choice of a quantizer, for one linear or for several that must agree. One variant per block and one option per
segment of it are chosen. Without fusion a block is one linear with one variant of one segment: a multiple-choice
knapsack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indexes = NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """One choice: the same spec for all `linears`."""

    linears: tuple[str, ...]
    specs: tuple[str, ...]
    loss: Floats  # [options], of all linears together
    costs: Floats  # [options, resources]


@dataclass(frozen=True)
class Variant:
    """One way to launch a block. `launches` names the linears that each launch covers; empty where nobody asked."""

    segments: tuple[Segment, ...]
    launches: tuple[tuple[str, ...], ...] = ()


Block = tuple[Variant, ...]


@dataclass(frozen=True)
class Selection:
    """One option per segment of the chosen variants, as rising indexes into a problem's options."""

    options: Indexes
    loss: float
    costs: Floats  # [resources]


class Problem:
    """Minimise the loss such that the costs stay within `limits` [resources], in the units of the costs.

    Raises ValueError when there is no block, or a block, variant or segment is empty.
    """

    def __init__(self, blocks: Sequence[Block], resources: Sequence[str], limits: Sequence[float] | Floats) -> None:
        variants = [variant for block in blocks for variant in block]
        segments = [segment for variant in variants for segment in variant.segments]
        if not blocks or not all(blocks) or not all(v.segments for v in variants):
            raise ValueError("a problem needs blocks, a block variants, a variant segments")
        if not all(segment.specs for segment in segments):
            raise ValueError("a segment needs options")
        self.blocks, self.variants, self.segments = list(blocks), variants, segments
        self.resources, self.limits = tuple(resources), np.asarray(limits, dtype=np.float64)
        self.loss: Floats = np.concatenate([segment.loss for segment in segments])
        self.costs: Floats = np.concatenate([segment.costs for segment in segments])
        self.segment_start = _starts(len(segment.specs) for segment in segments)
        self.variant_start = _starts(len(variant.segments) for variant in variants)
        self.block_start = _starts(len(block) for block in blocks)
        self.segment_of_option = np.repeat(np.arange(len(segments)), [len(segment.specs) for segment in segments])
        self.variant_of_segment = np.repeat(np.arange(len(variants)), [len(v.segments) for v in variants])
        self.block_of_variant = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])

    def minimising(self, resource: int) -> Problem:
        """Another objective: one resource, within the limits of the others."""
        others = [r for r in range(len(self.resources)) if r != resource]

        def turned(segment: Segment) -> Segment:
            return replace(segment, loss=segment.costs[:, resource], costs=segment.costs[:, others])

        blocks = [tuple(replace(v, segments=tuple(map(turned, v.segments))) for v in block) for block in self.blocks]
        return Problem(blocks, [self.resources[r] for r in others], self.limits[others])

    def selection(self, options: Indexes) -> Selection:
        return Selection(np.sort(options), float(self.loss[options].sum()), self.costs[options].sum(0))

    def within_limits(self, selection: Selection) -> bool:
        return bool((selection.costs <= self.limits).all())

    @cached_property
    def least(self) -> Floats:
        """The least of each resource that any choice needs, whatever the loss."""
        return np.array([self._block_least(self.costs[:, r]).sum() for r in range(len(self.resources))])

    def _block_least(self, value: Floats) -> Floats:
        segment = np.minimum.reduceat(value, self.segment_start)
        return np.minimum.reduceat(np.add.reduceat(segment, self.variant_start), self.block_start)

    def relax(self, multipliers: Floats) -> Relaxed:
        """The unconstrained optimum of loss + multipliers * costs: separable, hence exact."""
        value = self.loss + self.costs @ multipliers
        segment = np.minimum.reduceat(value, self.segment_start)
        variant = np.add.reduceat(segment, self.variant_start)
        block = np.minimum.reduceat(variant, self.block_start)
        chosen = _first_in_group(variant == block[self.block_of_variant], self.block_of_variant, len(self.blocks))
        best = _first_in_group(value == segment[self.segment_of_option], self.segment_of_option, len(self.segments))
        taken = np.zeros(len(self.variants), dtype=bool)
        taken[chosen] = True
        excess = value - segment[self.segment_of_option]
        excess += (variant - block[self.block_of_variant])[self.variant_of_segment][self.segment_of_option]
        bound = float(block.sum() - multipliers @ self.limits)
        return Relaxed(self.selection(best[taken[self.variant_of_segment]]), bound, excess)


@dataclass(frozen=True)
class Relaxed:
    """A Lagrangian relaxation solved. `bound` is below the constrained optimum; an option whose `excess` over the bound
    reaches a known loss is in no better solution."""

    selection: Selection
    bound: float
    excess: Floats  # [options]


def _starts(lengths: Iterable[int]) -> Indexes:
    sizes = np.fromiter(lengths, dtype=np.int64)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)[:-1]])


def _first_in_group(mask: NDArray[np.bool_], group: Indexes, count: int) -> Indexes:
    """For each group the lowest index at which `mask` is set."""
    found = np.flatnonzero(mask)[::-1]
    first = np.zeros(count, dtype=np.int64)
    first[group[found]] = found  # of several writes the last stays
    return first
