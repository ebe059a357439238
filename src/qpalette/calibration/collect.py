"""Runs calibration text through a model and sums the second moments of what its linears read and hand back.

Two sides take one backward pass for each window, with labels drawn from the model's own predictions: then the Fisher
form is the curvature of KL (`sensitivity.py`). The Kronecker form H_I (x) H_O is its expectation over errors that are
independent from one weight to the next, which is what rounding leaves before feedback shapes it: variance r_m c_k in
row m and column k, r the mean squares of the rows and c those of the equalized columns. So a token's x x^T is weighed
by g^T diag(r) g, its g g^T by x^T diag(c) x; weights from the moments themselves (a second pass) change nothing that
could be seen.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qpalette.calibration.gradients import backward_of_drawn_labels, frozen
from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.sums import GroupSums, PartialSums, expert_tokens, family_of, fill_up, sum_bytes
from qpalette.calibration.taps import Taps, Weight, one_expert_at_a_time, weights_of
from qpalette.core.errors import HessianError, InputError
from qpalette.core.records import LinearGroup

logger = logging.getLogger(__name__)

MEMORY_BUDGET = 4 << 30  # bytes
PARTIAL = "sums.partial"  # in the directory of a store

Progress = Callable[[int, int], None]  # (windows done, windows in all), over all passes and draws


def collect_hessians(
    model: Any,
    windows: Sequence[Tensor],
    groups: Iterable[LinearGroup],
    store: HessianStore,
    *,
    memory_budget_bytes: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> None:
    """Write the Hessians of each group that `store` does not have yet, of as many sides as its calibration says.

    `model` is a transformers model in evaluation mode on any device; `windows` are int64 [length] each, and each is
    read as often as the store's calibration has draws: with new labels its gradients are other samples. The sums are
    kept in float64 on the model's device, `memory_budget_bytes` of them at a time (or those of one group, or of a
    layer's experts, if they are more): a large model takes several passes over the text, each for a run of consecutive
    groups. Forward alone, a pass leaves the model after the last of them; with gradients it keeps activations from the
    first of them on, of one window. A window that is done is not read again: sums are kept on disk now and then, and
    a pass ends by writing its groups, so that an interrupted collection goes on and gives the same bytes.

    Experts are told from each other by the tokens that are routed to them. The first linears of all experts in a layer
    share one H_I. Where fewer tokens than inputs (or rows) came, the moments of all experts of the layer fill up.

    Raises InputError when there are no windows, CheckpointError when the model lacks a linear of a group, HessianError
    when no token reaches a group, its inputs overflow, or the store holds another calibration.
    """
    if not windows:
        raise InputError("there is no text to calibrate on")
    groups = list(groups)
    absent = {group.name for group in store.missing(groups)}
    passes = _passes(groups, absent, memory_budget_bytes, store.two_sided)
    identity = json.dumps(asdict(store.calibration))
    for index, run in enumerate(passes):
        weights = {group.name: weights_of(model, [linear.name for linear in group.linears]) for group in run}
        sums = [GroupSums(group, weights[group.name], store.two_sided) for group in run]
        partial = PartialSums(store.directory / PARTIAL, identity, sums)
        reader = Reader(model, sums, {name: weight for each in weights.values() for name, weight in each.items()})
        visits = len(windows) * store.calibration.draws
        for number in range(partial.load(), visits):
            draw, place = divmod(number, len(windows))
            if store.two_sided:
                reader.both_sides(windows[place], store.calibration.seed + number, again=draw > 0)
            else:
                reader.inputs(windows[place])
            partial.keep(number + 1)
            if progress is not None:
                progress(index * visits + number + 1, len(passes) * visits)
        if counts := expert_tokens(sums):
            store.count_experts(counts)
            _tell_of_idle_experts(counts)
        fill_up(sums)
        try:
            for item in sums:
                store.save(item.group, item.inputs, item.tokens, item.outputs)
        except HessianError:  # sums that cannot be used are not to be gone on with
            partial.remove()
            raise
        partial.remove()


def _tell_of_idle_experts(counts: Mapping[str, int]) -> None:
    layers: dict[str, dict[str, int]] = {}
    for expert, seen in counts.items():
        experts, _, index = expert.rpartition(".")
        layers.setdefault(experts, {})[index] = seen
    for experts, found in layers.items():
        if idle := [index for index, seen in found.items() if seen == 0]:
            logger.warning(
                "%s: %d of %d saw no token of the text (%s): they are rounded as if all inputs were alike; "
                "calibrate on more text, or on another",
                *(experts, len(idle), len(found), ", ".join(idle)),
            )


class _AllReached(Exception):
    """Leaves the forward pass: the layers above are not needed."""


class Reader:
    """Reads windows of text into the sums of a pass."""

    def __init__(self, model: Any, sums: Sequence[GroupSums], weights: Mapping[str, Weight]) -> None:
        self.model, self.weights = model, weights
        self._sums_of = {linear.name: item for item in sums for linear in item.group.linears}
        self._read_by = set().union(*(item.leaders for item in sums))

    def inputs(self, window: Tensor) -> None:
        """Forward only, up to the last of the linears."""
        waiting = set(self._read_by)

        def seen(linear: str, x: Tensor, y: Tensor, rows: slice) -> None:
            self._sums_of[linear].add_input(linear, x)
            waiting.discard(linear)
            if not waiting:
                raise _AllReached

        with torch.inference_mode(), one_expert_at_a_time(self.model), Taps(self.weights, seen), suppress(_AllReached):
            self.model(window[None].to(self.model.device), use_cache=False)

    def both_sides(self, window: Tensor, seed: int, again: bool = False) -> None:
        """Forward and backward; no gradient goes below the first of the linears, nor into a parameter. Tokens that are
        read `again`, for other labels, are not counted again."""

        def seen(linear: str, x: Tensor, y: Tensor, rows: slice) -> None:
            if not y.requires_grad:
                y.requires_grad_()
            y.register_hook(lambda gradient: self._sums_of[linear].add(linear, x, gradient[..., rows], again))

        with frozen(self.model), one_expert_at_a_time(self.model), Taps(self.weights, seen):
            backward_of_drawn_labels(self.model, window, torch.Generator().manual_seed(seed))


def _passes(groups: Iterable[LinearGroup], absent: set[str], budget: int, two_sided: bool) -> list[list[LinearGroup]]:
    """Runs of consecutive groups whose sums fit the budget; one that alone is beyond it has a pass for itself.

    Groups that fill each other up come together, and all of them again if one is absent.
    """
    families: dict[str, list[LinearGroup]] = {}
    for group in groups:
        families.setdefault(family_of(group), []).append(group)
    runs: list[list[LinearGroup]] = []
    free = 0
    for family in families.values():
        if not any(group.name in absent for group in family):
            continue
        size = sum(sum_bytes(group, two_sided) for group in family)
        if not runs or size > free:
            runs.append([])
            free = budget
        runs[-1] += family
        free -= size
    return runs
